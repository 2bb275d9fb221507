//! Cases as they are reported from inside a host, one JSON line each, and their sum outside.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Inside: what was run so far.
pub struct Report;

impl Report {
    /// Runs one case; its failure does not end the area.
    pub fn case(&mut self, name: &str, run: impl FnOnce() -> Result<()>) {
        self.done(name, run());
    }

    /// A case that was run elsewhere.
    pub fn done(&mut self, name: &str, outcome: Result<()>) {
        let failed = outcome.err().map(|e| format!("{e:#}"));
        say(&json!({ "case": name, "failed": failed }));
    }

    /// A case that cannot be run here, and why.
    pub fn skip(&mut self, name: &str, why: &str) {
        say(&json!({ "case": name, "skipped": why }));
    }

    /// Says how the area ended; an area that does not say so has failed.
    pub fn end(&mut self, outcome: Result<()>) {
        if let Err(e) = outcome {
            self.done("the area runs to its end", Err(e));
        }
        say(&json!({ "end": true }));
    }
}

fn say(line: &Value) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// Outside: an area's sum.
pub struct Outcome {
    area: String,
    passed: Vec<String>,
    pub failed: Vec<(String, String)>,
    skipped: Vec<(String, String)>,
}

/// Runs an area's process to its end.
pub fn read(command: &mut Command, area: &str) -> Result<Outcome> {
    let mut child = command.stdout(Stdio::piped()).spawn().context("entering the host")?;
    let mut outcome = Outcome {
        area: area.to_owned(),
        passed: vec![],
        failed: vec![],
        skipped: vec![],
    };
    let mut ended = false;
    let lines = BufReader::new(child.stdout.take().context("the area's output")?).lines();
    for line in lines.map_while(Result::ok) {
        let Ok(value) = serde_json::from_str::<Value>(&line) else {
            eprintln!("{line}");
            continue;
        };
        let name = value["case"].as_str().unwrap_or_default().to_owned();
        match (&value["failed"], &value["skipped"], &value["end"]) {
            (_, _, Value::Bool(true)) => {
                ended = true;
                break;
            }
            (Value::String(why), ..) => {
                eprintln!("FAILED  {area}: {name}: {why}");
                outcome.failed.push((name, why.clone()));
            }
            (_, Value::String(why), _) => {
                eprintln!("skipped {area}: {name}: {why}");
                outcome.skipped.push((name, why.clone()));
            }
            _ => {
                eprintln!("passed  {area}: {name}");
                outcome.passed.push(name);
            }
        }
    }
    if !ended {
        let why = format!("its process ended early: {}", child.wait()?);
        eprintln!("FAILED  {area}: {why}");
        outcome.failed.push(("the area runs to its end".to_owned(), why));
    }
    Ok(outcome)
}

impl Outcome {
    pub fn print(&self, json: bool) {
        let Self {
            area,
            passed,
            failed,
            skipped,
        } = self;
        if json {
            println!(
                "{}",
                json!({ "area": area, "passed": passed.len(), "failed": failed.len(), "skipped": skipped.len() })
            );
        } else {
            println!(
                "{area:<16} passed {}, failed {}, skipped {}",
                passed.len(),
                failed.len(),
                skipped.len()
            );
        }
    }
}
