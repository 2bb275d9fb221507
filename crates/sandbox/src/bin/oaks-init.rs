//! PID 1 of a machine, or the supervisor of a host's container groups. See `sandbox::supervisor`.
//!
//!     oaks-init --socket PATH --state DIR [--stop-grace SECONDS] [-- COMMAND ARGS..]
//!     oaks-init pause          reaps and sleeps: PID 1 of a pod whose containers share one pid namespace

use std::{ffi::OsString, path::PathBuf, process::ExitCode, time::Duration};

use sandbox::supervisor::init::{self, Config};

fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1)).and_then(|command| command.run().map_err(|error| error.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oaks-init: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Command {
    Supervise(Config),
    Pause,
}

impl Command {
    fn run(self) -> std::io::Result<()> {
        match self {
            Command::Supervise(config) => init::run(config),
            Command::Pause => init::pause(),
        }
    }
}

fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let (mut socket, mut state, mut grace, mut service) = (None, None, 5, Vec::new());
    while let Some(arg) = args.next() {
        let mut value = |name: &str| args.next().ok_or(format!("{name} needs a value"));
        match arg.to_str() {
            Some("pause") if socket.is_none() && state.is_none() => return Ok(Command::Pause),
            Some("--socket") => socket = Some(PathBuf::from(value("--socket")?)),
            Some("--state") => state = Some(PathBuf::from(value("--state")?)),
            Some("--stop-grace") => {
                let text = value("--stop-grace")?;
                grace = text
                    .to_str()
                    .and_then(|text| text.parse().ok())
                    .ok_or("--stop-grace takes whole seconds")?;
            }
            Some("--") => {
                service = args.by_ref().collect();
                break;
            }
            _ => return Err(format!("unknown argument {}", arg.to_string_lossy())),
        }
    }
    Ok(Command::Supervise(Config {
        socket: socket.ok_or("--socket is missing")?,
        state_dir: state.ok_or("--state is missing")?,
        service,
        stop_grace: Duration::from_secs(grace),
    }))
}
