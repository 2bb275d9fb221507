//! Black-box tests of the one binary: real processes in a host of their own, driven as a user would.

mod arm;
mod az;
mod az_edge;
mod az_network;
mod bad_input;
mod clients;
mod demo;
mod etcd;
mod faults;
mod instance;
mod kubectl;
mod two_hosts;
mod vnet_diff;
