//! Plan and apply of VNets and the edge; wire server, IMDS, VNet DNS. Knows no pods.
