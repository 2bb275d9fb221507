//! The CNI plug-in that gives pods addresses of their virtual network.

fn main() -> std::process::ExitCode {
    cni::entry::run(cni::entry::Program::Vnet)
}
