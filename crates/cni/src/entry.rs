//! From a process to a verb and back: standard input, standard output and the exit code.
//!
//! Exactly one JSON document leaves on standard output, or none where the specification wants silence; also when the
//! plug-in panics, whichever way panics are compiled.

use std::{
    io::{self, Read, Write},
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::Value;

use crate::{
    conf::{NetConf, STDIN_BYTES_MAX, version_hint},
    plugin::Call,
    spec::{Command, Failure, Invocation, Version, code, version_document},
};

/// Which binary this process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Vnet,
    Ipam,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Vnet => "azure-vnet",
            Self::Ipam => "azure-vnet-ipam",
        }
    }
}

/// Whether a document has been printed; the panic hook must not add a second one.
static PRINTED: AtomicBool = AtomicBool::new(false);
/// `cniVersion` for error documents, as far as it is known.
static VERSION_HINT: Mutex<String> = Mutex::new(String::new());

fn print(document: &Value) {
    if PRINTED.swap(true, Ordering::SeqCst) {
        return;
    }
    let mut out = io::stdout().lock();
    // Nobody is left to tell if this fails; the exit code still does.
    let _ = writeln!(out, "{document}");
    let _ = out.flush();
}

fn hint() -> String {
    match VERSION_HINT.lock() {
        Ok(v) if !v.is_empty() => v.clone(),
        _ => Version::V1_1_0.as_str().to_owned(),
    }
}

/// Serves one invocation of `program` from the process's environment and standard input.
pub fn run(program: Program) -> ExitCode {
    let name = program.name();
    std::panic::set_hook(Box::new(move |info| {
        let failure = Failure {
            details: info.to_string(),
            ..Failure::new(code::INTERNAL, format!("{name} has a bug and gave up"))
        };
        print(&failure.document(&hint()));
        // A scratch thread's panic may be caught and go on; the process must not print a result after this.
        std::process::exit(1);
    }));
    match serve(program, &|message| eprintln!("{name}: {message}")) {
        Ok(document) => {
            if let Some(document) = document {
                print(&document);
            }
            ExitCode::SUCCESS
        }
        Err(failure) => {
            print(&failure.document(&hint()));
            ExitCode::FAILURE
        }
    }
}

fn serve(program: Program, warn: &dyn Fn(&str)) -> Result<Option<Value>, Failure> {
    let invocation =
        Invocation::from_env(|name| std::env::var_os(name)).map_err(|e| Failure::from_error(code::ENVIRONMENT, &e))?;
    if invocation.command == Command::Version {
        return Ok(Some(version_document()));
    }
    let raw = read_stdin()?;
    let wire_server = std::env::var("AZURE_VNET_WIRE_SERVER").ok().filter(|v| !v.is_empty());
    let parse = match program {
        Program::Vnet => NetConf::parse,
        Program::Ipam => NetConf::parse_for_ipam,
    };
    let conf = parse(&raw, wire_server);
    if let Ok(mut v) = VERSION_HINT.lock() {
        *v = match &conf {
            Ok(conf) => conf.version.as_str().to_owned(),
            Err(_) => version_hint(&raw),
        };
    }
    let conf = conf.map_err(|e| Failure::from_error(e.code(), &e))?;
    if !conf.ignored.is_empty() {
        warn(&format!("keys without effect here: {}", conf.ignored.join(", ")));
    }
    let call = Call {
        invocation: &invocation,
        conf: &conf,
        warn,
    };
    match program {
        Program::Vnet => call.run_vnet(),
        Program::Ipam => call.run_ipam(),
    }
}

fn read_stdin() -> Result<Vec<u8>, Failure> {
    let mut raw = Vec::new();
    io::stdin()
        .lock()
        // One byte more than allowed, so that the parser sees that it is too much.
        .take(STDIN_BYTES_MAX as u64 + 1)
        .read_to_end(&mut raw)
        .map_err(|e| Failure {
            details: e.to_string(),
            ..Failure::new(code::IO, "reading the configuration from standard input")
        })?;
    Ok(raw)
}
