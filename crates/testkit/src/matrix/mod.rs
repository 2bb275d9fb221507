//! A connectivity matrix: who can open TCP, UDP and ICMP to whom, measured at once and compared with a table.
//!
//! ```text
//!              a     b     web@80      one column per target
//!     a        TUI   TUI   T
//!     b        TI    TUI   T@10.1.0.9  one row per endpoint that asks
//!     outside  -     -     T
//! ```
//! A cell lists what opens (`T`CP, `U`DP, `I`CMP echo, `D`NS), `-` is nothing; what is not listed must be closed. `@address`
//! says as whom the endpoint is seen; without it nobody looks. An answer counts only if it comes from an endpoint that may
//! answer for the target, so that traffic to a wrong place is a wrong cell, too.
//!
//! One thread per asking namespace sends every probe at once. A refusal ends a probe at its arrival; silence ends it
//! [`QUIET`] after everything that the table wants open has been decided.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

mod probe;
mod serve;

/// Where endpoints answer, over TCP and UDP.
pub const PORT: u16 = 7007;
/// How long after the last expected answer a probe may still be answered.
const QUIET: Duration = Duration::from_millis(150);
/// How long an expected answer may take.
const PATIENCE: Duration = Duration::from_secs(3);

/// A way to open something.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Probe {
    Tcp,
    Udp,
    Icmp,
    /// A name asked from the virtual network's DNS must have the target's address.
    Dns,
}

impl Probe {
    fn letter(self) -> char {
        match self {
            Self::Tcp => 'T',
            Self::Udp => 'U',
            Self::Icmp => 'I',
            Self::Dns => 'D',
        }
    }

    fn of(letter: char) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Icmp, Self::Dns]
            .into_iter()
            .find(|p| p.letter() == letter)
    }
}

/// A column: something that is asked.
#[derive(Clone, Debug)]
pub struct Target {
    name: String,
    address: Ipv4Addr,
    port: u16,
    probes: Vec<Probe>,
    /// Endpoints that may answer.
    by: BTreeSet<String>,
}

impl Target {
    /// Endpoint `name` at one of its addresses, by TCP, UDP and ICMP.
    pub fn endpoint(name: &str, address: &str) -> Self {
        Self::service(name, address, PORT, &[Probe::Tcp, Probe::Udp, Probe::Icmp], &[name])
    }

    /// An address and port that leads to any of the endpoints `by`; with [`Probe::Dns`], `name` is what is resolved.
    ///
    /// # Panics
    /// If `address` is none.
    pub fn service(name: &str, address: &str, port: u16, probes: &[Probe], by: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            address: address.parse().expect("an IPv4 address"),
            port,
            probes: probes.to_vec(),
            by: by.iter().map(|b| (*b).to_owned()).collect(),
        }
    }

    /// `name` resolves to `address`.
    pub fn resolved(name: &str, address: &str) -> Self {
        Self::service(name, address, 53, &[Probe::Dns], &[])
    }
}

/// What became of a probe.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Outcome {
    /// Opened; who answered and as whom it saw the caller, if the protocol tells.
    Open { by: String, seen: Option<Ipv4Addr> },
    /// An answer that says no, in words.
    Refused(String),
    /// An answer from an endpoint that is not the target.
    Stray(String),
    /// Nothing came.
    Silent,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { seen: Some(seen), .. } => write!(f, "open as {seen}"),
            Self::Open { .. } => f.write_str("open"),
            Self::Refused(why) => write!(f, "refused ({why})"),
            Self::Stray(by) => write!(f, "answered by {by:?}, which must not"),
            Self::Silent => f.write_str("silent"),
        }
    }
}

/// Endpoints that answer, and what is asked from each of them.
pub struct Matrix {
    endpoints: Vec<(String, PathBuf)>,
    targets: Vec<Target>,
    _servers: Vec<serve::Server>,
}

/// What one measurement found.
#[derive(Debug)]
pub struct Measured {
    /// Wrong cells, one line each.
    pub wrong: Vec<String>,
    pub probes: usize,
    /// Probes that nobody answered, not even with a refusal.
    pub silent: Vec<String>,
    /// In the form of the expected table.
    pub table: String,
}

/// A cell of the expected table.
#[derive(Clone, Debug, Default)]
struct Cell {
    open: BTreeSet<Probe>,
    seen: Option<Ipv4Addr>,
}

impl Matrix {
    /// Opens a server in each of the namespaces (name, path).
    ///
    /// # Errors
    /// If [`PORT`] is taken in one of them.
    pub fn new(endpoints: &[(&str, &Path)]) -> Result<Self> {
        let servers = endpoints
            .iter()
            .map(|(name, netns)| serve::Server::start(name, netns, PORT))
            .collect::<Result<_>>()?;
        Ok(Self {
            endpoints: endpoints
                .iter()
                .map(|(n, p)| ((*n).to_owned(), (*p).to_owned()))
                .collect(),
            targets: Vec::new(),
            _servers: servers,
        })
    }

    /// Asks `target` too.
    pub fn with(mut self, target: Target) -> Self {
        self.targets.push(target);
        self
    }

    /// Asks each of the endpoints (name, address) by TCP, UDP and ICMP.
    pub fn with_endpoints(self, endpoints: &[(&str, &str)]) -> Self {
        endpoints.iter().fold(self, |m, (n, a)| m.with(Target::endpoint(n, a)))
    }

    /// Measures every cell and compares with `expected`.
    ///
    /// # Errors
    /// If the table does not fit the endpoints and targets, or a probe cannot be made at all.
    pub fn measure(&self, expected: &str) -> Result<Measured> {
        let cells = self.parse(expected)?;
        let found: Vec<Vec<(usize, Probe, Outcome)>> = std::thread::scope(|scope| {
            let asking: Vec<_> = cells
                .iter()
                .map(|(row, cells)| {
                    let netns = &self.endpoints[*row].1;
                    scope.spawn(move || {
                        let wanted = |target: usize, probe: Probe| cells[target].open.contains(&probe);
                        linux::netns::run_in(netns, || probe::ask(&self.targets, wanted, PATIENCE, QUIET))?
                    })
                })
                .collect();
            asking
                .into_iter()
                .map(|t| t.join().unwrap_or_else(|e| std::panic::resume_unwind(e)))
                .collect::<Result<_>>()
        })?;
        let mut out = Measured {
            wrong: Vec::new(),
            probes: 0,
            silent: Vec::new(),
            table: String::new(),
        };
        let mut lines = vec![self.targets.iter().map(|t| t.name.clone()).collect::<Vec<_>>()];
        for ((row, cells), outcomes) in cells.iter().zip(found) {
            let mut line = vec![String::new(); self.targets.len()];
            for (target, probe, outcome) in outcomes {
                out.probes += 1;
                let way = format!("{} -> {} {probe:?}", self.endpoints[*row].0, self.targets[target].name);
                if outcome == Outcome::Silent {
                    out.silent.push(way.clone());
                }
                let open = matches!(outcome, Outcome::Open { .. });
                if open {
                    line[target].push(probe.letter());
                }
                if let Some(problem) = judge(&cells[target], probe, &outcome) {
                    out.wrong.push(format!("{way}: {problem}, was {outcome}"));
                }
            }
            lines.push(line);
        }
        let names: Vec<&str> = cells.iter().map(|(row, _)| self.endpoints[*row].0.as_str()).collect();
        out.table = layout(&names, &lines);
        Ok(out)
    }

    /// # Panics
    /// With the wrong cells and the measured table, unless every cell is as expected.
    pub fn check(&self, when: &str, expected: &str) {
        let measured = self.measure(expected).unwrap_or_else(|e| panic!("{when}: {e:#}"));
        assert!(
            measured.wrong.is_empty(),
            "{when}: {} of {} probes wrong\n  {}\nmeasured:\n{}",
            measured.wrong.len(),
            measured.probes,
            measured.wrong.join("\n  "),
            measured.table
        );
    }

    /// The rows of a table: number of the endpoint, a cell per target.
    fn parse(&self, text: &str) -> Result<Vec<(usize, Vec<Cell>)>> {
        let mut lines = text.lines().map(str::trim).filter(|l| !l.is_empty());
        let heads: Vec<&str> = lines.next().context("an empty table")?.split_whitespace().collect();
        let names: Vec<&str> = self.targets.iter().map(|t| t.name.as_str()).collect();
        ensure!(heads == names, "columns {heads:?} are not the targets {names:?}");
        let mut rows: Vec<(usize, Vec<Cell>)> = Vec::new();
        for line in lines {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap_or_default();
            let place = self.endpoints.iter().position(|(n, _)| n == name);
            let place = place.with_context(|| format!("no endpoint {name:?}"))?;
            ensure!(rows.iter().all(|(r, _)| *r != place), "two rows for {name}");
            let cells: Vec<Cell> = words.map(cell).collect::<Result<_>>()?;
            ensure!(
                cells.len() == names.len(),
                "{} cells for {} columns: {line}",
                cells.len(),
                names.len()
            );
            for (cell, target) in cells.iter().zip(&self.targets) {
                let asked = |p: &Probe| target.probes.contains(p);
                ensure!(
                    cell.open.iter().all(asked),
                    "{name} -> {}: {:?} is not asked",
                    target.name,
                    cell.open
                );
            }
            rows.push((place, cells));
        }
        Ok(rows)
    }
}

fn cell(text: &str) -> Result<Cell> {
    let (letters, seen) = match text.split_once('@') {
        Some((letters, seen)) => (
            letters,
            Some(seen.parse().with_context(|| format!("address in {text:?}"))?),
        ),
        None => (text, None),
    };
    let mut open = BTreeSet::new();
    if letters != "-" {
        for letter in letters.chars() {
            match Probe::of(letter) {
                Some(probe) if open.insert(probe) => {}
                _ => bail!("{letter:?} in {text:?} is none of T, U, I, D, or there twice"),
            }
        }
    }
    Ok(Cell { open, seen })
}

/// What is wrong with an outcome, if anything.
fn judge(cell: &Cell, probe: Probe, outcome: &Outcome) -> Option<String> {
    match (cell.open.contains(&probe), outcome) {
        (_, Outcome::Stray(_)) => Some("expected the target or nothing".to_owned()),
        (true, Outcome::Open { seen, .. }) => match (cell.seen, seen) {
            (Some(want), Some(seen)) if want != *seen => Some(format!("expected open as {want}")),
            _ => None,
        },
        (true, _) => Some("expected open".to_owned()),
        (false, Outcome::Open { .. }) => Some("expected closed".to_owned()),
        (false, _) => None,
    }
}

fn layout(names: &[&str], lines: &[Vec<String>]) -> String {
    let first = names.iter().map(|n| n.len()).max().unwrap_or(0) + 2;
    let width = |n: usize| lines.iter().map(|l| l[n].len()).max().unwrap_or(0).max(3) + 2;
    let mut out = String::new();
    for (name, line) in [""].iter().chain(names).zip(lines) {
        let _ = write!(out, "  {name:first$}");
        for (n, cell) in line.iter().enumerate() {
            let cell = if cell.is_empty() { "-" } else { cell };
            let _ = write!(out, "{cell:width$}", width = width(n));
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two namespaces joined by a veth; `b` refuses UDP and is silent to echoes.
    fn pair(dir: &Path) -> [PathBuf; 2] {
        let pins = ["a", "b"].map(|n| dir.join(n));
        for pin in &pins {
            linux::netns::create_named(pin).unwrap();
        }
        let run = |pin: &Path, script: &str| {
            let status = linux::netns::run_in(pin, || std::process::Command::new("sh").args(["-ec", script]).status());
            assert!(status.unwrap().unwrap().success(), "{script}");
        };
        run(
            &pins[0],
            &format!(
                "ip link add x0 type veth peer name x1 netns {}; ip addr add 192.0.2.1/24 dev x0; ip link set x0 up",
                pins[1].display()
            ),
        );
        run(
            &pins[1],
            "ip addr add 192.0.2.2/24 dev x1; ip link set x1 up; nft 'add table ip t; add chain ip t in { type filter hook input priority 0; }; \
             add rule ip t in udp dport 7007 reject with icmp type admin-prohibited; add rule ip t in icmp type echo-request drop'",
        );
        pins
    }

    #[test]
    fn open_refused_silent_and_stray_cells_are_told_apart() {
        let body = || {
            linux::netns::become_private_host(&[Path::new("/run")]).unwrap();
            let [a, b] = pair(Path::new("/run"));
            let matrix = Matrix::new(&[("a", &a), ("b", &b)])
                .unwrap()
                .with_endpoints(&[("a", "192.0.2.1"), ("b", "192.0.2.2")])
                .with(Target::service("mistaken", "192.0.2.1", PORT, &[Probe::Tcp], &["b"]));
            let good = "     a               b           mistaken
                        a    TUI@192.0.2.1   T@192.0.2.1 -
                        b    TUI@192.0.2.2   T           -";
            let measured = matrix.measure(good).unwrap();
            // The answers of the wrong endpoint are the only wrong cells.
            assert_eq!((measured.wrong.len(), measured.probes), (2, 14), "{measured:?}");
            assert!(measured.wrong[0].contains("a -> mistaken Tcp"), "{:?}", measured.wrong);
            assert_eq!(measured.silent, ["a -> b Icmp", "b -> b Icmp"], "{measured:?}");
            let bad = "a b mistaken\n a TU@192.0.2.9 TU -";
            let wrong = matrix.measure(bad).unwrap().wrong;
            for part in [
                "a -> a Tcp: expected open as 192.0.2.9, was open as 192.0.2.1",
                "a -> a Icmp: expected closed, was open",
                "a -> b Udp: expected open, was refused (ICMP 3/13 from 192.0.2.2)",
            ] {
                assert!(wrong.iter().any(|w| w == part), "{part}: {wrong:#?}");
            }
            for nonsense in [
                "",
                "a b",
                "a b mistaken\n c - - -",
                "a b mistaken\n a X - -",
                "a b mistaken\n a - -",
            ] {
                assert!(matrix.measure(nonsense).is_err(), "{nonsense:?}");
            }
        };
        if let Err(panic) = std::thread::spawn(body).join() {
            std::panic::resume_unwind(panic);
        }
    }
}
