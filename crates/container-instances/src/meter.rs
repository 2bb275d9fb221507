//! The meter: for every group, from its first image pull (or container, if the image is there) to its stop, one segment.
//!
//! Segments stand in an append-only journal, one JSON line per opening and closing, synced before the group goes on. Each
//! line carries the hash of the line before, so that nothing is changed or removed unseen. Integers only: rounding is a
//! matter of rating ([`Rule`]). Beside the journal stands one number, the last proof of life, renewed every second while
//! anything is open.
//!
//! After a crash: a segment whose group still runs goes on as it is; one whose group is gone is closed at the last proof
//! of life, cause `lost`. Nothing is opened twice, so nothing is billed twice.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use stdx::SharedClock;
use thiserror::Error;

#[derive(Debug, Error)]
pub enum MeterError {
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The journal was changed by somebody else.
    #[error("{path} line {line}: the chain is broken: {reason}")]
    Chain { path: PathBuf, line: usize, reason: String },
}

/// Whom a segment is about.
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct Subject {
    pub uid: String,
    pub cluster: String,
    pub node: String,
    pub namespace: String,
    pub name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub owner_kind: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub owner_name: String,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `standard`.
    pub sku: String,
    /// Requests as the pod asks for them.
    pub cpu_milli: i64,
    pub memory_bytes: i64,
}

#[derive(Clone, Debug, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "camelCase", tag = "record")]
enum Entry {
    #[serde(rename_all = "camelCase")]
    Open {
        id: String,
        at_ns: u64,
        cause: String,
        subject: Box<Subject>,
    },
    #[serde(rename_all = "camelCase")]
    Close {
        id: String,
        at_ns: u64,
        duration_ns: u64,
        cause: String,
    },
}

#[derive(Deserialize, Serialize)]
struct Line {
    seq: u64,
    /// Hash of the line before; empty in the first.
    prev: String,
    #[serde(flatten)]
    entry: Entry,
}

/// One segment.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Usage {
    /// First 16 hex digits of the hash of uid, start and sequence number.
    pub id: String,
    pub subject: Subject,
    /// Wall clock, nanoseconds since 1970.
    pub start_ns: u64,
    /// `None` = still open.
    pub end_ns: Option<u64>,
    /// Monotonic where one process saw both ends; never negative. Of an open segment: so far.
    pub duration_ns: u64,
    /// `pull-start`, `run`.
    pub opened_by: String,
    /// `stop`, `lost`.
    pub closed_by: Option<String>,
}

/// How a segment is rated. The one place where anything is rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    pub cpu_milli_min: i64,
    pub memory_bytes_min: i64,
}

impl Rule {
    /// Azure Container Instances': at least one vCPU and one GB (10^9 bytes), by the second.
    pub const ACI: Self = Self {
        cpu_milli_min: 1000,
        memory_bytes_min: 1_000_000_000,
    };
    /// What was asked for.
    pub const FAIR: Self = Self {
        cpu_milli_min: 0,
        memory_bytes_min: 0,
    };
}

impl Usage {
    /// Whole seconds, begun ones counted.
    pub fn seconds(&self) -> u64 {
        self.duration_ns.div_ceil(1_000_000_000)
    }

    /// Thousandths of a vCPU times seconds, and bytes times seconds.
    pub fn rated(&self, rule: &Rule) -> (u128, u128) {
        let s = u128::from(self.seconds());
        let of = |v: i64, min: i64| u128::try_from(v.max(min)).unwrap_or(0) * s;
        (
            of(self.subject.cpu_milli, rule.cpu_milli_min),
            of(self.subject.memory_bytes, rule.memory_bytes_min),
        )
    }
}

struct Open {
    id: String,
    start_ns: u64,
    /// Monotonic reading at the opening, if this process saw it.
    since: Option<std::time::Duration>,
    subject: Subject,
    cause: String,
}

struct State {
    journal: File,
    seq: u64,
    prev: String,
    open: HashMap<String, Open>,
    closed: Vec<Usage>,
}

/// One journal; cheap to share. Calls write to disk and are meant for a few per group, not for hot paths.
pub struct Meter {
    path: PathBuf,
    alive: File,
    clock: SharedClock,
    state: Mutex<State>,
}

/// Closed segments kept in memory for [`Meter::usage`]; the journal has them all.
const CLOSED_KEPT: usize = 10_000;

impl Meter {
    /// Opens or makes the journal `<dir>/usage.jsonl`. A torn last line (a crash in the middle of a write, so of a group
    /// that never went on) is cut off.
    ///
    /// # Errors
    /// `Chain` if the journal was tampered with: it is left as it is.
    pub fn open(dir: &Path, clock: SharedClock) -> Result<Self, MeterError> {
        let path = dir.join("usage.jsonl");
        let io = |doing: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| MeterError::Io { doing, path, source }
        };
        fs::create_dir_all(dir).map_err(io("making", dir))?;
        let open = |p: &Path| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(p)
        };
        let mut journal = open(&path).map_err(io("opening", &path))?;
        let alive_path = dir.join("alive");
        let alive = open(&alive_path).map_err(io("opening", &alive_path))?;
        let mut text = Vec::new();
        journal.read_to_end(&mut text).map_err(io("reading", &path))?;
        let whole = text.iter().rposition(|b| *b == b'\n').map_or(0, |i| i + 1);
        if whole < text.len() {
            journal.set_len(whole as u64).map_err(io("repairing", &path))?;
            text.truncate(whole);
        }
        journal.seek(SeekFrom::End(0)).map_err(io("opening", &path))?;
        let mut state = State {
            journal,
            seq: 0,
            prev: String::new(),
            open: HashMap::new(),
            closed: Vec::new(),
        };
        for (i, line) in text.split_inclusive(|b| *b == b'\n').enumerate() {
            let broken = |reason: String| MeterError::Chain {
                path: path.clone(),
                line: i + 1,
                reason,
            };
            let parsed: Line = serde_json::from_slice(line).map_err(|e| broken(e.to_string()))?;
            if parsed.prev != state.prev || parsed.seq != state.seq + 1 {
                return Err(broken("it does not follow the line before".into()));
            }
            state.seq = parsed.seq;
            state.prev = hash(line);
            state.replay(parsed.entry);
        }
        Ok(Self {
            path,
            alive,
            clock,
            state: Mutex::new(state),
        })
    }

    fn now_ns(&self) -> u64 {
        ns(self.clock.now())
    }

    /// Begins a segment for the group, unless one is open. True if it began.
    ///
    /// # Errors
    /// The journal cannot be written; the group must not go on unmetered.
    pub fn begin(&self, subject: &Subject, cause: &str) -> Result<bool, MeterError> {
        let mut s = self.state.lock();
        if s.open.contains_key(&subject.uid) {
            return Ok(false);
        }
        let at_ns = self.now_ns();
        let id = hash(format!("{}/{at_ns}/{}", subject.uid, s.seq + 1).as_bytes())[..16].to_owned();
        let entry = Entry::Open {
            id: id.clone(),
            at_ns,
            cause: cause.into(),
            subject: Box::new(subject.clone()),
        };
        self.append(&mut s, &entry)?;
        s.replay(entry);
        if let Some(o) = s.open.get_mut(&subject.uid) {
            o.since = Some(self.clock.monotonic());
        }
        drop(s);
        self.prove_alive();
        Ok(true)
    }

    /// Ends the group's segment, if one is open. True if it ended now.
    ///
    /// # Errors
    /// The journal cannot be written; the segment stays open.
    pub fn end(&self, uid: &str) -> Result<bool, MeterError> {
        let mut s = self.state.lock();
        let Some(o) = s.open.get(uid) else { return Ok(false) };
        let at_ns = self.now_ns().max(o.start_ns);
        let duration_ns = match o.since {
            Some(since) => u64::try_from(self.clock.monotonic().saturating_sub(since).as_nanos()).unwrap_or(u64::MAX),
            None => at_ns - o.start_ns,
        };
        let entry = Entry::Close {
            id: o.id.clone(),
            at_ns,
            duration_ns,
            cause: "stop".into(),
        };
        self.append(&mut s, &entry)?;
        s.replay(entry);
        Ok(true)
    }

    /// Closes the segments of groups that are not among `live`, at the last proof of life. For the start of a process,
    /// before anything begins. Returns how many.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub fn settle(&self, live: &[String]) -> Result<usize, MeterError> {
        let mut bytes = [0; 8];
        let proof = match self.alive.read_exact_at(&mut bytes, 0) {
            Ok(()) => u64::from_le_bytes(bytes),
            Err(_) => 0,
        };
        let mut s = self.state.lock();
        let lost: Vec<(String, u64)> = s
            .open
            .values()
            .filter(|o| !live.contains(&o.subject.uid))
            .map(|o| (o.id.clone(), o.start_ns))
            .collect();
        for (id, start_ns) in &lost {
            let at_ns = proof.max(*start_ns);
            let entry = Entry::Close {
                id: id.clone(),
                at_ns,
                duration_ns: at_ns - start_ns,
                cause: "lost".into(),
            };
            self.append(&mut s, &entry)?;
            s.replay(entry);
        }
        Ok(lost.len())
    }

    /// Writes down that this process lives, if anything is open. To be called every second.
    pub fn prove_alive(&self) {
        if self.state.lock().open.is_empty() {
            return;
        }
        if let Err(e) = self.alive.write_all_at(&self.now_ns().to_le_bytes(), 0) {
            tracing::warn!(error = %e, "proof of life not written");
        }
    }

    /// Every open segment and the newest closed ones, in the order of their start.
    pub fn usage(&self) -> Vec<Usage> {
        let s = self.state.lock();
        let (now, mono) = (self.now_ns(), self.clock.monotonic());
        let mut out = s.closed.clone();
        out.extend(s.open.values().map(|o| Usage {
            id: o.id.clone(),
            subject: o.subject.clone(),
            start_ns: o.start_ns,
            end_ns: None,
            duration_ns: match o.since {
                Some(since) => u64::try_from(mono.saturating_sub(since).as_nanos()).unwrap_or(u64::MAX),
                None => now.saturating_sub(o.start_ns),
            },
            opened_by: o.cause.clone(),
            closed_by: None,
        }));
        out.sort_by(|a, b| (a.start_ns, &a.id).cmp(&(b.start_ns, &b.id)));
        out
    }

    /// The segments of one group.
    pub fn usage_of(&self, uid: &str) -> Vec<Usage> {
        self.usage().into_iter().filter(|u| u.subject.uid == uid).collect()
    }

    /// What an open segment says of its group.
    pub fn subject(&self, uid: &str) -> Option<Subject> {
        self.state.lock().open.get(uid).map(|o| o.subject.clone())
    }

    fn append(&self, s: &mut State, entry: &Entry) -> Result<(), MeterError> {
        let line = Line {
            seq: s.seq + 1,
            prev: s.prev.clone(),
            entry: entry.clone(),
        };
        let fail = |source| MeterError::Io {
            doing: "writing",
            path: self.path.clone(),
            source,
        };
        let mut bytes = serde_json::to_vec(&line).map_err(|e| fail(io::Error::other(e)))?;
        bytes.push(b'\n');
        let before = s.journal.stream_position().map_err(fail)?;
        let written = s.journal.write_all(&bytes).and_then(|()| s.journal.sync_data());
        if let Err(e) = written {
            // What came through in part must not stay in front of the next line.
            let _ = s.journal.set_len(before);
            let _ = s.journal.seek(SeekFrom::Start(before));
            return Err(fail(e));
        }
        s.seq += 1;
        s.prev = hash(&bytes);
        Ok(())
    }
}

impl State {
    fn replay(&mut self, entry: Entry) {
        match entry {
            Entry::Open {
                id,
                at_ns,
                cause,
                subject,
            } => {
                self.open.insert(
                    subject.uid.clone(),
                    Open {
                        id,
                        start_ns: at_ns,
                        since: None,
                        subject: *subject,
                        cause,
                    },
                );
            }
            Entry::Close {
                id,
                at_ns,
                duration_ns,
                cause,
            } => {
                let uid = self.open.values().find(|o| o.id == id).map(|o| o.subject.uid.clone());
                let Some(o) = uid.and_then(|uid| self.open.remove(&uid)) else {
                    return;
                };
                if self.closed.len() >= CLOSED_KEPT {
                    self.closed.drain(..CLOSED_KEPT / 10);
                }
                self.closed.push(Usage {
                    id,
                    subject: o.subject,
                    start_ns: o.start_ns,
                    end_ns: Some(at_ns),
                    duration_ns,
                    opened_by: o.cause,
                    closed_by: Some(cause),
                });
            }
        }
    }
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

fn ns(at: SystemTime) -> u64 {
    u64::try_from(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use stdx::ManualClock;

    use super::*;

    fn subject(uid: &str) -> Subject {
        Subject {
            uid: uid.into(),
            name: "p".into(),
            cpu_milli: 500,
            memory_bytes: 1 << 29,
            sku: "standard".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_segment_lasts_from_begin_to_end() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at_unix(1_000));
        let m = Meter::open(dir.path(), clock.clone()).unwrap();
        assert!(m.begin(&subject("a"), "pull-start").unwrap());
        assert!(!m.begin(&subject("a"), "run").unwrap());
        clock.advance(Duration::from_millis(2_500));
        assert_eq!(m.usage()[0].duration_ns, 2_500_000_000);
        assert!(m.end("a").unwrap());
        assert!(!m.end("a").unwrap());
        let u = &m.usage_of("a")[0];
        assert_eq!((u.seconds(), u.closed_by.as_deref()), (3, Some("stop")));
        assert_eq!(u.rated(&Rule::ACI), (3_000, 3_000_000_000));
        assert_eq!(u.rated(&Rule::FAIR).0, 1_500);
        // A second run of the same group is a second segment.
        assert!(m.begin(&subject("a"), "run").unwrap());
        assert_eq!(m.usage_of("a").len(), 2);
        assert_ne!(m.usage_of("a")[0].id, m.usage_of("a")[1].id);
    }

    #[test]
    fn a_crash_neither_loses_nor_doubles() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at_unix(1_000));
        {
            let m = Meter::open(dir.path(), clock.clone()).unwrap();
            m.begin(&subject("gone"), "run").unwrap();
            m.begin(&subject("lives"), "run").unwrap();
            clock.advance(Duration::from_secs(7));
            m.prove_alive();
            // Killed here.
        }
        fs::OpenOptions::new()
            .append(true)
            .open(dir.path().join("usage.jsonl"))
            .unwrap()
            .write_all(b"{\"seq\":3,\"prev\":\"torn")
            .unwrap();
        clock.advance(Duration::from_secs(100));
        let m = Meter::open(dir.path(), clock.clone()).unwrap();
        assert_eq!(m.settle(&["lives".into()]).unwrap(), 1);
        assert_eq!(m.settle(&["lives".into()]).unwrap(), 0);
        let gone = &m.usage_of("gone")[0];
        assert_eq!(
            (gone.duration_ns, gone.closed_by.as_deref()),
            (7_000_000_000, Some("lost"))
        );
        assert!(!m.begin(&subject("lives"), "run").unwrap());
        m.end("lives").unwrap();
        assert_eq!(m.usage_of("lives")[0].duration_ns, 107_000_000_000);
        drop(m);
        // Replaying the journal once more changes nothing.
        let again = Meter::open(dir.path(), clock).unwrap();
        assert_eq!(again.usage().len(), 2);
        assert!(again.usage().iter().all(|u| u.end_ns.is_some()));
    }

    #[test]
    fn a_clock_set_back_bills_nothing_negative() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at_unix(1_000));
        let m = Meter::open(dir.path(), clock.clone()).unwrap();
        m.begin(&subject("a"), "run").unwrap();
        clock.advance(Duration::from_secs(5));
        clock.set_wall(UNIX_EPOCH + Duration::from_secs(10));
        m.end("a").unwrap();
        let u = &m.usage_of("a")[0];
        assert_eq!((u.duration_ns, u.end_ns.unwrap() >= u.start_ns), (5_000_000_000, true));
    }

    #[test]
    fn a_changed_line_breaks_the_chain() {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::at_unix(1_000));
        let m = Meter::open(dir.path(), clock.clone()).unwrap();
        m.begin(&subject("a"), "run").unwrap();
        m.end("a").unwrap();
        drop(m);
        let path = dir.path().join("usage.jsonl");
        let text = fs::read_to_string(&path)
            .unwrap()
            .replacen("\"cpuMilli\":500", "\"cpuMilli\":100", 1);
        fs::write(&path, text).unwrap();
        assert!(matches!(
            Meter::open(dir.path(), clock),
            Err(MeterError::Chain { line: 2, .. })
        ));
    }
}
