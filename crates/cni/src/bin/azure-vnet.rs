//! The CNI plug-in that gives pods addresses of their virtual network.

#[global_allocator]
static ALLOCATOR: cni::Arena = cni::Arena::new();

fn main() -> std::process::ExitCode {
    cni::entry::run(cni::entry::Program::Vnet)
}
