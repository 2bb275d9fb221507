//! VNet, NIC, NSG and route types, IPAM, wire-server XML, NSG evaluator. No IO.
