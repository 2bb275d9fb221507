//! `cargo xtask tidy`: structure, formats and lints that need no build.
//!
//! Rules: real dependency edges equal those that ARCHITECTURE.md's table allows; every module opens with `//!`; `unsafe`
//! stands only in `sys` modules; nothing names this workplace or a registry host; sources are formatted.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context, Result, bail};

use crate::sh;

pub fn run(_args: &[String]) -> Result<()> {
    let mut problems = Vec::new();
    edges(&mut problems)?;
    sources(&mut problems)?;
    if let Err(e) = sh::run("cargo", &["fmt", "--all", "--check"]) {
        problems.push(format!("{e}: run `cargo fmt --all`"));
    }
    if problems.is_empty() {
        return Ok(());
    }
    for p in &problems {
        eprintln!("tidy: {p}");
    }
    bail!("{} problems", problems.len())
}

/// Crate name -> crates it may depend on, from the table in ARCHITECTURE.md; `None` means any.
fn allowed(text: &str) -> BTreeMap<String, Option<BTreeSet<String>>> {
    let mut out = BTreeMap::new();
    for line in text.lines().filter(|l| l.starts_with("| `")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [name, .., deps] = cells.as_slice() else { continue };
        let name = name.trim_matches('`').to_owned();
        let deps = match *deps {
            "all" | "any" => None,
            "-" => Some(BTreeSet::new()),
            list => Some(list.split(',').map(|d| d.trim().to_owned()).collect()),
        };
        out.insert(name, deps);
    }
    out
}

fn edges(problems: &mut Vec<String>) -> Result<()> {
    let text = fs::read_to_string(sh::root().join("ARCHITECTURE.md")).context("reading ARCHITECTURE.md")?;
    let table = allowed(&text);
    let metadata: serde_json::Value = serde_json::from_str(&sh::read(
        "cargo",
        &["metadata", "--format-version", "1", "--no-deps", "--offline"],
    )?)?;
    let packages = metadata["packages"].as_array().cloned().unwrap_or_default();
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for package in &packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(allowed) = table.get(name) else {
            problems.push(format!("crate {name} is missing in ARCHITECTURE.md's table"));
            continue;
        };
        let Some(allowed) = allowed else { continue };
        for dep in package["dependencies"].as_array().into_iter().flatten() {
            let to = dep["name"].as_str().unwrap_or_default();
            // Tests may use anything.
            if dep["kind"] == "dev" || !ours.contains(to) || to == "stdx" || allowed.contains(to) {
                continue;
            }
            if to == "apimachinery" && allowed.contains("reconcile") {
                continue;
            }
            problems.push(format!("{name} depends on {to}, which ARCHITECTURE.md does not allow"));
        }
    }
    Ok(())
}

fn sources(problems: &mut Vec<String>) -> Result<()> {
    let listed = sh::read("git", &["ls-files"])?;
    // Spelled in halves so that this file passes its own rule.
    let banned = [
        concat!("/wo", "rk/"),
        concat!("deb.deb", "ian.org"),
        concat!("static.crates", ".io"),
        concat!("files.python", "hosted"),
    ];
    for file in listed.lines() {
        let path = sh::root().join(file);
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if !file.ends_with(".lock") && !file.ends_with("go.sum") {
            for word in banned.iter().filter(|w| text.contains(**w)) {
                problems.push(format!("{file} names {word}"));
            }
        }
        if file.ends_with(".rs") && file.contains("/src/") {
            rust_source(file, &path, &text, problems);
        }
    }
    Ok(())
}

fn rust_source(file: &str, path: &Path, text: &str, problems: &mut Vec<String>) {
    let is_tests = file.ends_with("tests.rs");
    if !is_tests && !text.starts_with("//!") && !text.starts_with("#!") {
        problems.push(format!("{file} does not open with a module doc (//!)"));
    }
    let in_sys = path
        .components()
        .any(|c| c.as_os_str() == "sys" || c.as_os_str() == "sys.rs");
    if !in_sys {
        // In halves, as above.
        let keyword = concat!("uns", "afe");
        let forms = [" {", " fn", " impl"].map(|rest| format!("{keyword}{rest}"));
        for (n, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            if forms.iter().any(|f| code.contains(f.as_str())) {
                problems.push(format!("{file}:{} uses unsafe outside a sys module", n + 1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_table() {
        let t = allowed(
            "| crate | purpose | may |\n|---|---|---|\n| `a` | x | - |\n| `b` | y | a, c |\n| `z` | all | any |\n",
        );
        assert_eq!(t["a"], Some(BTreeSet::new()));
        assert_eq!(t["b"], Some(BTreeSet::from(["a".to_owned(), "c".to_owned()])));
        assert_eq!(t["z"], None);
    }
}
