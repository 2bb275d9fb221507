//! One-shot helper.
fn main() {}
