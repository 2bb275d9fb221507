//! Upstream's Go programs as module dependencies: built once, kept below `target/tools`, built again if anything that they
//! are made of has changed. Compiled packages stay in Go's own cache.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{setup, sh};

/// A module below `tests/peers` that pins what is built.
pub struct Module {
    dir: PathBuf,
    out: PathBuf,
    go: String,
}

/// The version of every program of Kubernetes that is built, as `tests/peers/kubernetes/go.mod` pins it.
pub const KUBERNETES: &str = "v1.36.4";

impl Module {
    pub fn new(name: &str) -> Result<Self> {
        let out = setup::tools().join(format!("peers-{name}"));
        fs::create_dir_all(&out)?;
        Ok(Self {
            dir: sh::root().join("tests/peers").join(name),
            out,
            go: setup::go()?,
        })
    }

    /// Where the programs are.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// A main package, of this module or of one that it requires.
    pub fn build(&self, name: &str, package: &str) -> Result<PathBuf> {
        self.make(name, &["build"], package)
    }

    /// A package's tests as a program.
    pub fn build_tests(&self, name: &str, package: &str) -> Result<PathBuf> {
        self.make(name, &["test", "-c"], package)
    }

    /// The folder of a required module's sources, below Go's cache.
    pub fn sources(&self, module: &str) -> Result<PathBuf> {
        let dir = self.dir.to_string_lossy().into_owned();
        sh::retry(module, || {
            sh::run_in(&self.dir, &self.go, &["mod", "download", module], ENV)
        })?;
        sh::read(
            &self.go,
            &["-C", &dir, "list", "-mod=mod", "-m", "-f", "{{.Dir}}", module],
        )
        .map(PathBuf::from)
    }

    fn make(&self, name: &str, verb: &[&str], package: &str) -> Result<PathBuf> {
        let out = self.out.join(name);
        let stamp = self.out.join(format!("{name}.stamp"));
        let flags = link_flags();
        let want = format!("{package}\n{flags}\n{}", self.inputs()?);
        if out.is_file() && fs::read_to_string(&stamp).is_ok_and(|s| s == want) {
            return Ok(out);
        }
        let target = out.to_string_lossy().into_owned();
        let mut args = vec!["-n", "15", &self.go];
        args.extend(verb);
        args.extend(["-trimpath", "-ldflags", &flags, "-o", &target, package]);
        sh::step(&format!("building {name}"), || {
            sh::retry(name, || sh::run_in(&self.dir, "nice", &args, ENV))
        })?;
        fs::write(stamp, want)?;
        Ok(out)
    }

    /// Everything of the module that decides what is built.
    fn inputs(&self) -> Result<String> {
        let mut files = vec![];
        collect(&self.dir, &mut files)?;
        files.sort();
        let mut text = String::new();
        for file in files {
            text += &fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
        }
        Ok(text)
    }
}

const ENV: &[(&str, &str)] = &[("CGO_ENABLED", "0"), ("GOFLAGS", "-mod=mod")];

/// Without a version the programs say v0.0.0, which clients and the end-to-end suite believe.
fn link_flags() -> String {
    let (major, minor) = ("1", KUBERNETES.split('.').nth(1).unwrap_or_default());
    let mut flags = "-s -w".to_owned();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        flags += &format!(
            " -X {package}.gitVersion={KUBERNETES} -X {package}.gitMajor={major} -X {package}.gitMinor={minor}"
        );
    }
    flags
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)?.flatten().map(|e| e.path()) {
        if entry.is_dir() {
            collect(&entry, files)?;
        } else if entry.extension().is_some_and(|e| e == "go" || e == "mod" || e == "sum") {
            files.push(entry);
        }
    }
    Ok(())
}
