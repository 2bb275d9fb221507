//! The binaries azure-vnet and azure-vnet-ipam: small, synchronous, no async runtime.
