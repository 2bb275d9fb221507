//! The supervisor program as its clients see it.

use std::{
    io::{Read, Write},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};

use sandbox::supervisor::{
    client::Client,
    protocol::{Frame, Reason, Spawn, Stdio},
};

struct Init {
    dir: tempfile::TempDir,
    child: Child,
    client: Client,
}

impl Init {
    fn start(service: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (child, client) = Self::launch(dir.path(), service);
        Self { dir, child, client }
    }

    fn launch(dir: &Path, service: &[&str]) -> (Child, Client) {
        let socket = dir.join("init.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_oaks-init"));
        command
            .arg("--socket")
            .arg(&socket)
            .arg("--state")
            .arg(dir.join("state"))
            .args(["--stop-grace", "1"]);
        if !service.is_empty() {
            command.arg("--").args(service);
        }
        let child = command.spawn().unwrap();
        let client = Client::new(socket);
        until("the supervisor answers", || {
            client.hello().is_ok_and(|pid| pid == child.id())
        });
        (child, client)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A shell script whose output goes to `<id>.log`.
    fn sh(&self, id: &str, script: &str, stdin: bool) -> u32 {
        let spawn = Spawn {
            id: id.to_owned(),
            argv: ["/bin/sh", "-c", script].map(String::from).to_vec(),
            env: vec![("PATH".into(), "/usr/bin:/bin".into())],
            stdio: Stdio::Log {
                path: self.path(&format!("{id}.log")),
                bytes_max: 10 << 20,
                stdin,
                stdin_once: stdin,
            },
            ..Spawn::default()
        };
        self.client.spawn(spawn, &[]).unwrap().0
    }

    fn log(&self, id: &str) -> String {
        let text = std::fs::read_to_string(self.path(&format!("{id}.log"))).unwrap();
        text.lines()
            .map(|line| line.split_once(' ').unwrap().1.to_owned() + "\n")
            .collect()
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.client.shutdown(Duration::from_millis(50));
        until("the supervisor ends", || self.child.try_wait().unwrap().is_some());
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

const LONG: Option<Duration> = Some(Duration::from_secs(20));

#[test]
fn output_is_logged_and_exit_codes_are_kept_until_forgotten() {
    let init = Init::start(&[]);
    init.sh("a", "echo out; echo err >&2; exit 7", false);
    let exit = init.client.wait("a", LONG).unwrap();
    assert_eq!((exit.code, exit.signal), (7, None));
    let mut lines: Vec<String> = init.log("a").lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["stderr F err", "stdout F out"]);

    init.sh("b", "kill -9 $$", false);
    assert_eq!(init.client.wait("b", LONG).unwrap().code, 137);
    let ids: Vec<String> = init
        .client
        .list()
        .unwrap()
        .into_iter()
        .map(|process| process.id)
        .collect();
    assert_eq!(ids, ["a", "b"]);
    init.client.forget("a").unwrap();
    init.client.forget("a").unwrap();
    assert_eq!(
        init.client.wait("a", LONG).unwrap_err().reason(),
        Some(Reason::NotFound)
    );
    assert!(!init.path("state/exits/a").exists() && init.path("state/exits/b").exists());
}

#[test]
fn bad_requests_are_refused_one_by_one() {
    let init = Init::start(&[]);
    let spawn = |id: &str, argv: &[&str]| {
        let argv = argv.iter().map(|arg| (*arg).to_owned()).collect();
        init.client
            .spawn(
                Spawn {
                    id: id.into(),
                    argv,
                    ..Spawn::default()
                },
                &[],
            )
            .map_err(|error| error.reason())
    };
    assert_eq!(spawn("../x", &["true"]).unwrap_err(), Some(Reason::Invalid));
    assert_eq!(spawn("x", &[]).unwrap_err(), Some(Reason::Invalid));
    assert_eq!(spawn("x", &["/does/not/exist"]).unwrap_err(), Some(Reason::Start));
    let pid = init.sh("run", "sleep 1000", false);
    assert_eq!(spawn("run", &["true"]).unwrap_err(), Some(Reason::AlreadyExists));
    assert_eq!(init.client.forget("run").unwrap_err().reason(), Some(Reason::Running));
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    init.client.signal("run", 9, false).unwrap();
    assert_eq!(init.client.wait("run", LONG).unwrap().code, 137);
}

#[test]
fn attached_clients_write_input_and_see_output_and_the_exit() {
    let init = Init::start(&[]);
    init.sh("cat", "cat; echo done >&2; exit 3", true);
    let mut stream = init.client.attach("cat", true).unwrap();
    let mut bytes = Vec::new();
    let big = vec![b'x'; 60_000];
    // More than pipe and queue hold, so that back-pressure is needed.
    for _ in 0..40 {
        Frame::Stdin(big.clone()).encode(&mut bytes);
    }
    Frame::Stdin(b"\n".to_vec()).encode(&mut bytes);
    Frame::CloseStdin.encode(&mut bytes);
    let mut writer = stream.try_clone().unwrap();
    let writes = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let (mut buffer, mut out, mut err, mut code) = (Vec::new(), 0, Vec::new(), None);
    let mut chunk = [0; 16 << 10];
    while code.is_none() {
        let len = stream.read(&mut chunk).unwrap();
        assert!(len > 0, "closed before the exit");
        buffer.extend_from_slice(&chunk[..len]);
        while let Some(frame) = Frame::decode(&mut buffer).unwrap() {
            match frame {
                Frame::Stdout(data) => out += data.len(),
                Frame::Stderr(data) => err.extend(data),
                Frame::Exit(status) => code = Some(status),
                other => panic!("{other:?}"),
            }
        }
    }
    writes.join().unwrap();
    assert_eq!(
        (out, err.as_slice(), code),
        (60_000 * 40 + 1, b"done\n".as_slice(), Some(3))
    );
}

#[test]
fn passed_descriptors_become_standard_io() {
    let init = Init::start(&[]);
    let (stdin, mut input) = std::io::pipe().unwrap();
    let (mut output, stdout) = std::io::pipe().unwrap();
    let spawn = Spawn {
        id: "p".into(),
        argv: vec!["/bin/cat".into()],
        stdio: Stdio::Passed,
        ephemeral: true,
        ..Spawn::default()
    };
    init.client
        .spawn(spawn, &[stdin.as_fd(), stdout.as_fd(), stdout.as_fd()])
        .unwrap();
    drop((stdin, stdout));
    input.write_all(b"hello").unwrap();
    drop(input);
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello");
    assert_eq!(init.client.wait("p", LONG).unwrap().code, 0);
    assert!(!init.path("state/exits/p").exists());
}

#[test]
fn watchers_hear_of_every_exit_and_orphans_are_reaped() {
    let init = Init::start(&[]);
    let mut watch = init.client.watch().unwrap();
    init.sh(
        "parent",
        &format!("(sleep 0.05; echo gone > {}) & echo $!", init.path("orphan").display()),
        false,
    );
    assert_eq!(init.client.next_exit(&mut watch).unwrap().id, "parent");
    let log = init.log("parent");
    let orphan = log.trim().rsplit(' ').next().unwrap().to_owned();
    until("the orphan is reaped", || {
        init.path("orphan").exists() && !Path::new(&format!("/proc/{orphan}")).exists()
    });
}

#[test]
fn an_exit_survives_the_death_of_the_supervisor() {
    let mut init = Init::start(&[]);
    init.sh("late", "exit 9", false);
    until("the exit is saved", || init.path("state/exits/late").exists());
    init.child.kill().unwrap();
    init.child.wait().unwrap();
    (init.child, init.client) = Init::launch(init.dir.path(), &[]);
    assert_eq!(init.client.wait("late", LONG).unwrap().code, 9);
}

#[test]
fn the_service_is_restarted_and_ends_with_the_supervisor() {
    let mark = tempfile::tempdir().unwrap();
    let script = format!(
        "echo start >> {0}/starts; echo $$ > {0}/pid; exec sleep 1000",
        mark.path().display()
    );
    let mut init = Init::start(&["/bin/sh", "-c", &script]);
    let starts = || {
        std::fs::read_to_string(mark.path().join("starts"))
            .unwrap_or_default()
            .lines()
            .count()
    };
    let pid = || {
        std::fs::read_to_string(mark.path().join("pid"))
            .unwrap_or_default()
            .trim()
            .parse::<i32>()
            .ok()
    };
    until("the service runs", || pid().is_some());
    let first = pid().unwrap();
    let killed = Command::new("kill").args(["-9", &first.to_string()]).status().unwrap();
    assert!(killed.success());
    until("the service runs again", || {
        starts() == 2 && pid().is_some_and(|pid| pid != first)
    });
    let second = pid().unwrap();
    // A child that ignores SIGTERM is killed after the grace period.
    init.sh("stubborn", "trap '' TERM; while :; do sleep 0.1; done", false);
    let term = Command::new("kill").arg(init.child.id().to_string()).status().unwrap();
    assert!(term.success());
    until("the supervisor ends", || init.child.try_wait().unwrap().is_some());
    until("the service ended", || !Path::new(&format!("/proc/{second}")).exists());
}
