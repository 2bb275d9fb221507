//! `cargo xtask conformance [--focus RE] [--dry-run] [--json]`: upstream's end-to-end suite of the pinned version against a
//! fresh cluster with two nodes, on a platform in namespaces of its own.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::go::Module;
use crate::{setup, sh};

const NODE_FREE: &str = include_str!("../../../tests/peers/kubernetes/node-free.txt");
const CLUSTER: &str = include_str!("cluster.sh");
/// Of a whole run. One test that waits in vain takes up to five minutes.
const TIMEOUT: &str = "3h";

#[derive(Default)]
struct Options {
    focus: Option<String>,
    dry_run: bool,
    json: bool,
}

pub fn run(args: &[String]) -> Result<()> {
    let options = parse(args)?;
    sh::step("system packages", setup::packages)?;
    let kubectl = sh::step("kubectl", setup::kubectl)?;
    let suite = Module::new("kubernetes")?.build_tests("e2e.test", "k8s.io/kubernetes/test/e2e")?;
    let dir = sh::root().join("target/conformance/kubernetes");
    fs::create_dir_all(&dir)?;
    let report = dir.join("report.json");
    let _ = fs::remove_file(&report);

    let focus = options.focus.clone().unwrap_or_else(node_free);
    let mut arguments = vec![
        suite.to_string_lossy().into_owned(),
        "--provider=skeleton".to_owned(),
        format!("--kubectl-path={}", kubectl.display()),
        format!("--ginkgo.focus={focus}"),
        format!("--ginkgo.json-report={}", report.display()),
        format!("--ginkgo.timeout={TIMEOUT}"),
        "--ginkgo.no-color".to_owned(),
        "--dump-logs-on-failure=false".to_owned(),
    ];
    let log = dir.join("e2e.log");
    if options.dry_run {
        arguments.push("--ginkgo.dry-run".to_owned());
        let out = Command::new(&arguments[0]).args(&arguments[1..]).output()?;
        fs::write(&log, [out.stdout, out.stderr].concat())?;
    } else {
        sh::step("build", || {
            sh::run("cargo", &["build", "--workspace", "--bins", "--locked"])
        })?;
        sh::step("images", || images(&suite))?;
        arguments.push("--kubeconfig=".to_owned() + &scratch().join("kubeconfig").to_string_lossy());
        sh::step("end-to-end suite", || on_a_cluster(&arguments, &log))?;
    }
    let text = fs::read(&report).with_context(|| format!("the suite left no report; see {}", log.display()))?;
    let outcome = Outcome::read(&serde_json::from_slice(&text)?)?;
    outcome.print(options.json);
    fs::write(dir.join("failures.txt"), outcome.failures())?;
    eprintln!(
        "{} has every failure, {} everything",
        dir.join("failures.txt").display(),
        log.display()
    );
    if outcome.total(|a| a.failed.len()) > 0 {
        bail!("{} tests failed", outcome.total(|a| a.failed.len()));
    }
    Ok(())
}

fn parse(args: &[String]) -> Result<Options> {
    let mut options = Options::default();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--focus" => options.focus = Some(args.next().context("--focus needs a regular expression")?.clone()),
            "--dry-run" => options.dry_run = true,
            "--json" => options.json = true,
            other => bail!("unknown argument {other}; cargo xtask conformance [--focus RE] [--dry-run] [--json]"),
        }
    }
    Ok(options)
}

/// The committed list as one expression.
fn node_free() -> String {
    let lines: Vec<&str> = NODE_FREE
        .lines()
        .filter(|l| !l.is_empty() && !l.starts_with('#'))
        .collect();
    format!("({}).*\\[Conformance\\]", lines.join("|"))
}

fn scratch() -> PathBuf {
    std::env::temp_dir().join(format!("oaks-conformance-{}", std::process::id()))
}

/// Runs the suite inside; its own exit code says no more than its report.
fn on_a_cluster(arguments: &[String], log: &Path) -> Result<()> {
    let dir = scratch();
    fs::create_dir_all(&dir)?;
    let script = dir.join("cluster.sh");
    fs::write(&script, CLUSTER)?;
    let output = fs::File::create(log)?;
    let status = Command::new("unshare")
        .args([
            "--net",
            "--mount",
            "--pid",
            "--uts",
            "--ipc",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
        ])
        .arg(&script)
        .args(arguments)
        .env("OAKS", sh::root().join("target/debug/oaks"))
        .env("DIR", &dir)
        .env("OAKS_INSTANCE", format!("c{:x}", std::process::id() & 0xffff))
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .context("starting unshare")?;
    let _ = fs::remove_dir_all(&dir);
    eprintln!("the suite ended with {status}");
    Ok(())
}

/// Stand-ins for the images that the suite names: there is no registry. agnhost is built from upstream's sources, the rest
/// are Debian's programs: `(name without version, packages, has agnhost, entrypoint, command)`.
const STAND_INS: &[(&str, &[&str], bool, &str, &str)] = &[
    ("registry.k8s.io/pause", &[], true, "[/agnhost, pause]", "[]"),
    (
        "registry.k8s.io/e2e-test-images/agnhost",
        &[
            "bash",
            "coreutils",
            "curl",
            "bind9-dnsutils",
            "netcat-openbsd",
            "grep",
            "sed",
        ],
        true,
        "[/agnhost]",
        "[pause]",
    ),
    (
        "registry.k8s.io/e2e-test-images/busybox",
        &["dash", "coreutils", "grep", "sed", "hostname", "wget", "procps"],
        false,
        "[]",
        "[/bin/sh]",
    ),
    (
        "registry.k8s.io/e2e-test-images/nginx",
        &["nginx-light", "dash", "coreutils"],
        false,
        "[/usr/sbin/nginx, -g, daemon off;]",
        "[]",
    ),
];

/// Builds the stand-ins with the versions that the suite asks for, into the data folder that the platform will find.
fn images(suite: &Path) -> Result<()> {
    let agnhost = Module::new("kubernetes")?.build("agnhost", "k8s.io/kubernetes/test/images/agnhost")?;
    let list = sh::read(&suite.to_string_lossy(), &["--list-images"])?;
    let oaks = sh::root().join("target/debug/oaks").to_string_lossy().into_owned();
    let data = scratch().join("data").to_string_lossy().into_owned();
    let mut lines: Vec<&str> = list.lines().collect();
    lines.sort_unstable();
    for (n, image) in lines.iter().enumerate() {
        let name = image.rsplit_once(':').map(|(name, _)| name);
        let Some((_, packages, with_agnhost, entrypoint, cmd)) = STAND_INS.iter().find(|(i, ..)| name == Some(i))
        else {
            continue;
        };
        let recipe = scratch().join(format!("image{n}"));
        fs::create_dir_all(&recipe)?;
        let mut text = format!(
            "name: {image}\npackages: {packages:?}\ndirectories: [/tmp, /run, /uploads, /var/log/nginx, /var/lib/nginx]\n\
             entrypoint: {entrypoint}\ncmd: {cmd}\nenv: {{ PATH: /usr/sbin:/usr/bin:/sbin:/bin }}\n"
        );
        if *with_agnhost {
            fs::copy(&agnhost, recipe.join("agnhost"))?;
            text += "files:\n  - { from: agnhost, to: /agnhost, mode: 493 }\n";
        }
        fs::write(recipe.join("image.yaml"), text)?;
        sh::run(
            &oaks,
            &["image", "build", &recipe.to_string_lossy(), "--data-dir", &data],
        )?;
        fs::remove_dir_all(&recipe)?;
    }
    Ok(())
}

/// A test's sig, as its name begins.
#[derive(Default)]
struct Area {
    passed: usize,
    failed: Vec<(String, String)>,
    skipped: usize,
}

struct Outcome(BTreeMap<String, Area>);

impl Outcome {
    /// Tests that the focus left out are not counted; skipped are those that skipped themselves.
    fn read(report: &Value) -> Result<Self> {
        let mut areas: BTreeMap<String, Area> = BTreeMap::new();
        let specs = report[0]["SpecReports"].as_array().context("the report has no specs")?;
        for spec in specs {
            let it = spec["LeafNodeType"] == "It";
            let failed = !matches!(spec["State"].as_str(), Some("passed" | "skipped" | "pending"));
            if !it && !failed {
                continue;
            }
            let name = name(spec);
            let area = name
                .strip_prefix('[')
                .and_then(|n| n.split(']').next())
                .unwrap_or("suite")
                .to_owned();
            let area = areas.entry(area).or_default();
            let message = spec["Failure"]["Message"].as_str().unwrap_or_default();
            match spec["State"].as_str() {
                Some("passed") => area.passed += 1,
                // The focus leaves no message; a test that skips itself says why.
                Some("skipped" | "pending") if message.is_empty() => {}
                Some("skipped" | "pending") => area.skipped += 1,
                _ => area.failed.push((name, message.to_owned())),
            }
        }
        areas.retain(|_, a| a.passed + a.skipped + a.failed.len() > 0);
        if areas.is_empty() {
            bail!("no test matches the focus");
        }
        Ok(Self(areas))
    }

    fn total(&self, f: impl Fn(&Area) -> usize) -> usize {
        self.0.values().map(f).sum()
    }

    fn print(&self, json: bool) {
        for (area, a) in &self.0 {
            if json {
                println!(
                    "{}",
                    json!({ "area": area, "passed": a.passed, "failed": a.failed.len(), "skipped": a.skipped })
                );
            } else {
                println!(
                    "{area:<20} passed {:>3}, failed {:>3}, skipped {:>3}",
                    a.passed,
                    a.failed.len(),
                    a.skipped
                );
            }
        }
    }

    fn failures(&self) -> String {
        let mut text = String::new();
        for (name, message) in self.0.values().flat_map(|a| &a.failed) {
            text += &format!("{name}\n    {}\n", message.replace('\n', "\n    "));
        }
        text
    }
}

fn name(spec: &Value) -> String {
    let texts = spec["ContainerHierarchyTexts"].as_array();
    let mut name: Vec<&str> = texts.into_iter().flatten().filter_map(Value::as_str).collect();
    name.extend(spec["LeafNodeText"].as_str());
    name.join(" ")
}
