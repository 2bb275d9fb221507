//! The real binaries in namespaces of their own.

mod families;
mod hostile;
mod lifecycle;
mod machine;
mod masquerade;
