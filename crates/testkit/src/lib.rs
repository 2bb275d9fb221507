//! Hosts, test clusters, fakes, connectivity matrix, world checker (dev only).
