//! Where the facts come from: pinned Go modules, fetched by the ordinary Go client.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use flate2::{Compression, write::GzEncoder};

/// Release of `k8s.io/api` and `k8s.io/apimachinery`.
pub const API_VERSION: &str = "v0.36.4";
/// The same release's Kubernetes tag, for the published OpenAPI and discovery documents.
pub const KUBERNETES_VERSION: &str = "v1.36.4";

/// Unpacked directory of a Go module.
pub fn module(path: &str, version: &str) -> Result<PathBuf> {
    let out = Command::new("go")
        .args(["mod", "download", "-json", &format!("{path}@{version}")])
        .output()
        .context("run the go tool, which the type generator needs")?;
    ensure!(
        out.status.success(),
        "go mod download {path}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    let facts: serde_json::Value = serde_json::from_slice(&out.stdout)?;
    Ok(PathBuf::from(facts["Dir"].as_str().context("no Dir in go's answer")?))
}

/// Root of this repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask has a parent")
        .to_owned()
}

/// Writes `bytes` gzipped without name and time, so that equal input gives equal files.
pub fn write_gz(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut gz = GzEncoder::new(Vec::new(), Compression::best());
    gz.write_all(bytes)?;
    let packed = gz.finish()?;
    std::fs::create_dir_all(path.parent().context("no parent")?)?;
    println!("{}: {} bytes ({} unpacked)", path.display(), packed.len(), bytes.len());
    std::fs::write(path, packed).with_context(|| format!("write {}", path.display()))
}
