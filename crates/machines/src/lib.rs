//! Machine providers (namespaces first), the host agent, the Dialer.
