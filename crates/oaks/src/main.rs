//! The one binary of Oaks; each verb lives in its module.

mod access;
mod az;
mod bench;
mod cli;
mod control_planes;
mod demo;
mod dialer;
mod doctor;
mod down;
mod engine;
mod group_nics;
mod host;
mod hosts;
mod image;
mod keeper;
mod kubeconfig;
mod kubeconfig_verbs;
mod node;
mod paths;
mod pod_addresses;
mod process;
mod pull;
mod recipe;
mod server;
mod signer;
mod status;
mod tokens;
mod up;
mod virtual_nodes;
mod vnet_verbs;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
