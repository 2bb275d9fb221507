//! The IPAM plug-in over the machine's own address pool.

#[global_allocator]
static ALLOCATOR: cni::Arena = cni::Arena::new();

fn main() -> std::process::ExitCode {
    cni::entry::run(cni::entry::Program::Ipam)
}
