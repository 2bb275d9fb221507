//! Kills a writing process at random moments and shows that no acknowledged write is lost.
//!
//! The child is this test binary again, told by an environment variable to write and to print each acknowledgement.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use store::{Engine, LocalEngine, Op};

const DIR: &str = "STORE_CRASH_DIR";
const WRITERS: usize = 8;

/// The child's body; returns at once when run as an ordinary test.
#[test]
fn child_writes_until_killed() {
    let Some(dir) = std::env::var_os(DIR) else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let engine = open(Path::new(&dir));
    runtime.block_on(async {
        let tasks: Vec<_> = (0..WRITERS)
            .map(|w| {
                let ks = engine.keyspace(if w % 2 == 0 { "even" } else { "odd" }).unwrap();
                tokio::spawn(async move {
                    for n in 0_u64.. {
                        let value = format!("{n:020}{}", "x".repeat(500 + (n as usize * 37) % 1500));
                        let ops = vec![
                            Op::put(format!("w{w}"), value.clone()),
                            Op::put(format!("w{w}/{}", n % 64), value),
                        ];
                        let rev = ks.txn(vec![], ops).await.unwrap();
                        let line = format!("ack {w} {n} {rev}\n");
                        std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn kill_loses_no_acknowledged_write() {
    let dir = tempfile::tempdir().unwrap();
    let mut seed = std::process::id() as u64;
    for round in 0..4 {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let kill_after = 50 + (seed >> 33) % 1500;
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "child_writes_until_killed",
                "--nocapture",
                "--test-threads=1",
            ])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut acked: HashMap<usize, (u64, u64)> = HashMap::new();
        let mut count = 0;
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let Ok(line) = line else { break };
            let Some(at) = line.find("ack ") else { continue };
            let numbers: Vec<u64> = line[at + 4..].split(' ').filter_map(|n| n.parse().ok()).collect();
            if let [w, n, rev] = numbers[..] {
                acked.insert(w as usize, (n, rev));
            }
            count += 1;
            if count == kill_after {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(count >= kill_after, "the child ended early");

        let engine = open(dir.path());
        for (w, (n, rev)) in &acked {
            let ks = engine.keyspace(if w % 2 == 0 { "even" } else { "odd" }).unwrap();
            assert!(ks.revision() >= *rev, "round {round}: revision went back");
            let mut stored = None;
            let key = format!("w{w}");
            ks.range(key.as_bytes(), &mut |e| {
                if e.key == key.as_bytes() {
                    stored = Some((
                        String::from_utf8_lossy(&e.value[..20]).parse::<u64>().unwrap(),
                        e.mod_rev,
                    ));
                }
            })
            .unwrap();
            let (value, mod_rev) = stored.expect("an acknowledged key is missing");
            assert!(
                value >= *n && mod_rev >= *rev,
                "round {round}, writer {w}: acknowledged {n}@{rev}, found {value}@{mod_rev}"
            );
            // Both keys of a transaction carry its revision: a transaction is recovered whole or not at all.
            let twin = format!("w{w}/{}", value % 64);
            let mut whole = false;
            ks.range(twin.as_bytes(), &mut |e| {
                whole |= e.key == twin.as_bytes() && e.mod_rev == mod_rev
            })
            .unwrap();
            assert!(whole, "round {round}, writer {w}: half a transaction");
        }
    }
}

/// Opens the database once its previous owner has let go of it (a dropped engine closes on its committer thread).
fn open(dir: &Path) -> Arc<LocalEngine> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match LocalEngine::open(dir) {
            Ok(engine) => return engine,
            Err(error) if Instant::now() > deadline => panic!("{error:?}"),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}
