//! The one-shot container helper; see `sandbox::runc`.

fn main() -> std::process::ExitCode {
    sandbox::runc::main(std::env::args_os().skip(1))
}
