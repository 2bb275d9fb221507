//! The IPAM plug-in over the machine's own address pool.

fn main() -> std::process::ExitCode {
    cni::entry::run(cni::entry::Program::Ipam)
}
