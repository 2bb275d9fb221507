//! What tests share: a host of their own, bounded waiting, a connectivity matrix, frames made by hand. Dev only.

pub mod debian;
pub mod frame;
mod host;
pub mod matrix;
mod wait;

pub use host::{Host, HostDiff};
pub use wait::{eventually, eventually_every};

use std::path::PathBuf;

/// A binary of this workspace, built by the test run (`target/<profile>/<name>`).
///
/// # Panics
/// If it is not there: `cargo build --workspace --bins` makes it.
pub fn bin(name: &str) -> PathBuf {
    // Test programs live in target/<profile>/deps.
    let mut dir = std::env::current_exe().expect("a running test has a path");
    dir.pop();
    if dir.ends_with("deps") {
        dir.pop();
    }
    let path = dir.join(name);
    assert!(
        path.is_file(),
        "{} is missing; run `cargo build --workspace --bins`",
        path.display()
    );
    path
}
