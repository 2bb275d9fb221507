//! Running programs: every call prints what it runs, fails loudly and may be retried.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// The repository's root folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// Runs `program args` in the root; its output goes to ours.
pub fn run(program: &str, args: &[&str]) -> Result<()> {
    run_in(&root(), program, args, &[])
}

pub fn run_in(dir: &Path, program: &str, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    eprintln!("+ {program} {}", args.join(" "));
    let status = Command::new(program)
        .args(args)
        .envs(env.iter().copied())
        .current_dir(dir)
        .status()
        .with_context(|| format!("starting {program}"))?;
    if !status.success() {
        bail!("{program} {} ended with {status}", args.join(" "));
    }
    Ok(())
}

/// Standard output of a program, trimmed; standard error is shown.
pub fn read(program: &str, args: &[&str]) -> Result<String> {
    let out = Command::new(program)
        .args(args)
        .current_dir(root())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("starting {program}"))?;
    if !out.status.success() {
        bail!("{program} {} ended with {}", args.join(" "), out.status);
    }
    Ok(String::from_utf8_lossy(&out.stdout).trim().to_owned())
}

/// Downloads fail now and then: three tries, two and four seconds apart.
pub fn retry(what: &str, mut f: impl FnMut() -> Result<()>) -> Result<()> {
    let mut wait = Duration::from_secs(2);
    for attempt in 1.. {
        match f() {
            Ok(()) => return Ok(()),
            Err(e) if attempt == 3 => return Err(e.context(format!("{what}: third try"))),
            Err(e) => {
                eprintln!("{what}: try {attempt} failed: {e:#}; again in {} s", wait.as_secs());
                thread::sleep(wait);
                wait *= 2;
            }
        }
    }
    unreachable!("the loop returns")
}

/// Runs one named step and prints how long it took.
pub fn step<T>(name: &str, f: impl FnOnce() -> Result<T>) -> Result<T> {
    let start = Instant::now();
    eprintln!("== {name}");
    let out = f().with_context(|| name.to_owned())?;
    eprintln!("== {name}: {:.1} s", start.elapsed().as_secs_f64());
    Ok(out)
}

pub fn have(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
