//! The embedded engine with real pods.

mod common;

use std::time::{Duration, Instant};

use common::{isolated, sh, until};
use sandbox::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn a_pod_runs_logs_and_ends() {
    isolated("a_pod_runs_logs_and_ends", async |world| {
        let sandbox = world.sandbox("web").await;
        let status = world.engine.sandbox_status(&sandbox).await.unwrap();
        assert_eq!((status.state, status.pod.name.as_str()), (SandboxState::Ready, "web"));
        let id = world
            .run(
                &sandbox,
                "main",
                "echo out; echo err >&2; hostname; echo $FROM_IMAGE; exit 3",
            )
            .await;
        let status = world.exited(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
        assert!(status.started_at.unwrap() <= status.finished_at.unwrap());
        assert_eq!(world.log(&id, "stdout").await, "out\nweb\n1\n");
        assert_eq!(world.log(&id, "stderr").await, "err\n");
        let done = world.run(&sandbox, "done", "true").await;
        assert_eq!(world.exited(&done).await.reason, "Completed");
        world.engine.remove_sandbox(&sandbox).await.unwrap();
        world.engine.remove_sandbox(&sandbox).await.unwrap();
        assert!(world.engine.list_containers().await.unwrap().is_empty());
        world.assert_empty();
    });
}

#[test]
fn containers_are_confined() {
    isolated("containers_are_confined", async |world| {
        let sandbox = world.sandbox("jail").await;
        let id = world.run(&sandbox, "main", "sleep 1000").await;
        let (_, text) = world.sh(&id, "grep -E 'Seccomp:|NoNewPrivs|CapEff|CapBnd' /proc/1/status; echo pid $$; id -u; ls /proc/self/fd | wc -l").await;
        assert!(text.contains("Seccomp:\t2"), "{text}");
        let caps = text.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
        let caps = u64::from_str_radix(caps, 16).unwrap();
        assert_eq!(caps & (1 << 21), 0, "SYS_ADMIN is left: {caps:x}");
        for (script, refused) in [
            ("mount -t tmpfs x /tmp", true),
            ("unshare -m true", true),
            ("echo 1 > /proc/sys/vm/swappiness", true),
            ("mknod /tmp/disk b 254 0 && cat /tmp/disk", true),
            ("hostname other", true),
            ("echo x > /dev/null && echo y > /tmp/file", false),
            ("test -z \"$(cat /proc/keys 2>/dev/null)\"", false),
        ] {
            let (code, text) = world.sh(&id, script).await;
            assert_eq!(code != 0, refused, "{script}: {text}");
        }
        // Commands are filtered like the first process, also without no-new-privileges.
        let (_, text) = world
            .sh(
                &id,
                "grep Seccomp: /proc/self/status; grep CapEff /proc/self/status /proc/1/status",
            )
            .await;
        assert!(text.contains("Seccomp:\t2"), "{text}");
        let own: Vec<&str> = text.lines().filter_map(|line| line.split("CapEff:\t").nth(1)).collect();
        assert_eq!(own[0], own[1]);

        let mut user = sh(
            "user",
            "id -u; id -g; id -G; umask; echo $HOME; touch /x 2>/dev/null || echo denied; echo again > /dev/stdout",
        );
        user.security.run_as_user = Some(1000);
        user.security.no_new_privs = true;
        user.security.readonly_rootfs = true;
        let user = world.start_container(&sandbox, user).await;
        world.exited(&user).await;
        assert_eq!(
            world.log(&user, "stdout").await,
            "1000\n1001\n1001 1002\n0022\n/tmp\ndenied\nagain\n"
        );

        let mut bad = sh("bad", "true");
        bad.security.seccomp = Seccomp::Localhost("p.json".into());
        assert!(matches!(
            world.engine.create_container(&sandbox, bad).await,
            Err(Error::Unsupported { .. })
        ));
        let mut root = sh("root", "true");
        root.security.run_as_non_root = true;
        assert!(matches!(
            world.engine.create_container(&sandbox, root).await,
            Err(Error::Invalid { .. })
        ));
        // Nothing is left of the refused ones, so their names are free.
        world.run(&sandbox, "root", "true").await;
    });
}

#[test]
fn limits_hold_and_are_reported() {
    isolated("limits_hold_and_are_reported", async |world| {
        let sandbox = world.sandbox("limits").await;
        // Setting up is not charged to the container: it starts in far less memory than the helper needs, and in time.
        let mut tiny = sh("tiny", "echo tiny");
        tiny.resources.memory_limit_bytes = 2 << 20;
        tiny.resources.cpu_limit_milli = 10;
        let tiny = world.start_container(&sandbox, tiny).await;
        assert_eq!(world.exited(&tiny).await.exit_code, 0);

        let mut hog = sh("hog", "a=x; while :; do a=$a$a; done");
        hog.resources.memory_limit_bytes = 32 << 20;
        let hog = world.start_container(&sandbox, hog).await;
        let status = world.exited(&hog).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));

        let mut spin = sh("spin", "while :; do :; done");
        spin.resources.cpu_limit_milli = 100;
        spin.resources.pids_limit = 7;
        let spin = world.start_container(&sandbox, spin).await;
        let (_, text) = world.sh(&spin, "cd /sys/fs/cgroup; cat cpu.max pids.max cpu/cpu.cfs_quota_us pids/pids.max; ls cpu memory | grep -c main; cat /proc/self/cgroup").await;
        assert!(
            text.contains("10000") && text.contains("\n7\n") && text.contains(":/\n") && !text.contains(&spin),
            "{text}"
        );
        let (start, before) = (
            Instant::now(),
            world.engine.container_stats(&spin).await.unwrap().cpu_usage_core_ns,
        );
        until("half a second has passed", async || {
            start.elapsed() > Duration::from_millis(500)
        })
        .await;
        let stats = world.engine.container_stats(&spin).await.unwrap();
        let share = (stats.cpu_usage_core_ns - before) as f64 / start.elapsed().as_nanos() as f64;
        assert!(share < 0.25, "{share}");
        assert!(stats.pids == 1 && stats.memory_working_set_bytes > 0, "{stats:?}");
    });
}

#[test]
fn commands_have_their_own_streams_and_codes() {
    isolated("commands_have_their_own_streams_and_codes", async |world| {
        let sandbox = world.sandbox("exec").await;
        let id = world.run(&sandbox, "main", "sleep 1000").await;
        let argv = |script: &str| ["sh", "-c", script].map(String::from).to_vec();
        let (code, out, err) = world
            .engine
            .exec_sync(&id, argv("echo o; echo e >&2; exit 42"), 10_000)
            .await
            .unwrap();
        assert_eq!((code, &out[..], &err[..]), (42, &b"o\n"[..], &b"e\n"[..]));
        let (_, out, _) = world
            .engine
            .exec_sync(&id, argv("yes | head -c 100000"), 10_000)
            .await
            .unwrap();
        assert_eq!(out.len(), 16 << 10);
        let slow = world.engine.exec_sync(&id, argv("sleep 1000"), 100).await;
        assert!(matches!(slow, Err(Error::Timeout { .. })), "{slow:?}");
        let missing = world
            .engine
            .exec_sync(&id, vec!["nonsense".into()], 1000)
            .await
            .unwrap_err()
            .to_string();
        assert!(
            missing.contains("nonsense") && missing.contains("not found"),
            "{missing}"
        );

        let request = ExecRequest {
            argv: argv("cat; exit 5"),
            stdin: true,
            stdout: true,
            ..ExecRequest::default()
        };
        let mut session = world.engine.exec(&id, request).await.unwrap();
        assert!(session.stderr.is_none());
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"through").await.unwrap();
        drop(stdin);
        let mut text = String::new();
        session.stdout.take().unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!((text.as_str(), session.exit.await.unwrap().unwrap()), ("through", 5));

        let request = ExecRequest {
            argv: argv("tty; stty size; read x; stty size; echo got $x; exit 6"),
            stdin: true,
            stdout: true,
            tty: true,
            ..ExecRequest::default()
        };
        let mut session = world.engine.exec(&id, request).await.unwrap();
        let (mut stdin, mut stdout) = (session.stdin.take().unwrap(), session.stdout.take().unwrap());
        let mut text = Vec::new();
        while text.iter().filter(|byte| **byte == b'\n').count() < 2 {
            assert!(
                stdout.read_buf(&mut text).await.unwrap() > 0,
                "{}",
                String::from_utf8_lossy(&text)
            );
        }
        session.resize.as_ref().unwrap().send((132, 43)).await.unwrap();
        let resized = async || world.sh(&id, "stty -F /dev/pts/0 size").await.1 == "43 132\n";
        until("the terminal is resized", resized).await;
        stdin.write_all(b"word\n").await.unwrap();
        stdout.read_to_end(&mut text).await.unwrap();
        let text = String::from_utf8_lossy(&text);
        assert!(
            text.contains("/dev/pts/0") && text.contains("43 132") && text.contains("got word"),
            "{text}"
        );
        assert_eq!(session.exit.await.unwrap().unwrap(), 6);
    });
}

#[test]
fn attaching_reaches_the_first_process() {
    isolated("attaching_reaches_the_first_process", async |world| {
        let sandbox = world.sandbox("attach").await;
        let mut config = sh("main", "while read line; do echo got $line; done; echo end >&2; exit 4");
        (config.stdin, config.stdin_once) = (true, true);
        let id = world.start_container(&sandbox, config).await;
        let mut session = world.engine.attach(&id, true).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"one\ntwo\n").await.unwrap();
        drop(stdin);
        let (mut out, mut err) = (String::new(), String::new());
        session.stdout.take().unwrap().read_to_string(&mut out).await.unwrap();
        session.stderr.take().unwrap().read_to_string(&mut err).await.unwrap();
        assert_eq!((out.as_str(), err.as_str()), ("got one\ngot two\n", "end\n"));
        assert_eq!(session.exit.await.unwrap().unwrap(), 4);
        world.exited(&id).await;
        assert_eq!(world.log(&id, "stdout").await, out);

        let mut config = sh("tty", "tty; read x; echo $x; stty size");
        (config.stdin, config.tty) = (true, true);
        let id = world.start_container(&sandbox, config).await;
        let mut session = world.engine.attach(&id, true).await.unwrap();
        session.resize.as_ref().unwrap().send((100, 30)).await.unwrap();
        // The size and the input take different ways.
        until("the terminal is resized", async || {
            world.sh(&id, "stty -F /dev/pts/0 size").await.1 == "30 100\n"
        })
        .await;
        session.stdin.as_mut().unwrap().write_all(b"typed\n").await.unwrap();
        assert_eq!(world.exited(&id).await.exit_code, 0);
        let log = world.log(&id, "stdout").await;
        assert!(
            log.contains("/dev/pts/0") && log.contains("typed") && log.contains("30 100"),
            "{log}"
        );
    });
}

#[test]
fn pods_survive_the_engine_and_its_successor_finds_everything() {
    isolated(
        "pods_survive_the_engine_and_its_successor_finds_everything",
        async |mut world| {
            let sandbox = world.sandbox("keep").await;
            let id = world
                .run(
                    &sandbox,
                    "main",
                    "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done",
                )
                .await;
            let late = world
                .run(&sandbox, "late", "mkfifo /tmp/go; read x < /tmp/go; exit 9")
                .await;
            let before = world.status(&id).await;
            // Half a container, half a sandbox: what a kill in the middle leaves behind.
            for dir in ["root/containers/half", "root/sandboxes/half", "run/c/half"] {
                std::fs::create_dir(world.dir.join(dir)).unwrap();
            }
            world.reopen().await;
            let after = world.status(&id).await;
            assert_eq!(
                (after.state, after.started_at, after.created_at),
                (ContainerState::Running, before.started_at, before.created_at)
            );
            assert_eq!(world.engine.list_sandboxes().await.unwrap().len(), 1);
            assert!(
                !world.dir.join("root/containers/half").exists() && !world.dir.join("root/sandboxes/half").exists()
            );
            let lines = world.log(&id, "stdout").await.lines().count();
            until("the log goes on", async || {
                world.log(&id, "stdout").await.lines().count() > lines + 2
            })
            .await;
            let numbers: Vec<usize> = world
                .log(&id, "stdout")
                .await
                .lines()
                .map(|line| line.parse().unwrap())
                .collect();
            assert_eq!(numbers, (1..=numbers.len()).collect::<Vec<_>>());
            assert_eq!(world.sh(&id, "hostname").await, (0, "keep\n".into()));
            world.engine.stop_container(&id, 0).await.unwrap();
            assert_eq!(world.status(&id).await.exit_code, 137);
            // The successor hears of exits, and of one that happened while no engine was there.
            until("the fifo exists", async || {
                world.sh(&late, "test -p /tmp/go").await.0 == 0
            })
            .await;
            world.sh(&late, "echo x > /tmp/go").await;
            assert_eq!(world.exited(&late).await.exit_code, 9);
            world.engine.remove_sandbox(&sandbox).await.unwrap();
        },
    );
}

#[test]
fn stopping_is_graceful_first() {
    isolated("stopping_is_graceful_first", async |world| {
        let sandbox = world.sandbox("stop").await;
        let mut events = world.engine.events();
        let polite = world
            .run(
                &sandbox,
                "polite",
                "trap 'echo bye; exit 0' TERM; echo ready; while :; do sleep 0.01; done",
            )
            .await;
        let stubborn = world
            .run(
                &sandbox,
                "stubborn",
                "trap '' TERM; echo ready; while :; do sleep 0.01; done",
            )
            .await;
        for id in [&polite, &stubborn] {
            until("the traps are set", async || {
                world.log(id, "stdout").await.contains("ready")
            })
            .await;
        }
        world.engine.stop_container(&polite, 20).await.unwrap();
        assert_eq!(
            (
                world.status(&polite).await.exit_code,
                world.log(&polite, "stdout").await.as_str()
            ),
            (0, "ready\nbye\n")
        );
        let start = Instant::now();
        world.engine.stop_container(&stubborn, 1).await.unwrap();
        assert_eq!(world.status(&stubborn).await.exit_code, 137);
        assert!(start.elapsed() >= Duration::from_secs(1));
        let mut seen = Vec::new();
        while seen.len() < 4 {
            seen.push(futures::StreamExt::next(&mut events).await.unwrap());
        }
        let stops = seen
            .iter()
            .filter(|event| matches!(event, RuntimeEvent::ContainerStopped { pod_uid, .. } if pod_uid == "uid-stop"));
        assert_eq!(stops.count(), 2, "{seen:?}");
        world.engine.stop_sandbox(&sandbox).await.unwrap();
        world.engine.stop_sandbox(&sandbox).await.unwrap();
        assert_eq!(
            world.engine.sandbox_status(&sandbox).await.unwrap().state,
            SandboxState::NotReady
        );
        assert!(world.engine.create_container(&sandbox, sh("x", "true")).await.is_err());
    });
}

#[test]
fn a_failed_start_is_an_exit_with_a_reason() {
    isolated("a_failed_start_is_an_exit_with_a_reason", async |world| {
        let sandbox = world.sandbox("fail").await;
        let mut config = sh("main", "");
        config.command = vec!["/no/such/program".into()];
        let id = world.engine.create_container(&sandbox, config).await.unwrap();
        let error = world.engine.start_container(&id).await.unwrap_err().to_string();
        assert!(error.contains("/no/such/program"), "{error}");
        let status = world.status(&id).await;
        assert_eq!(
            (status.state, status.exit_code, status.reason.as_str()),
            (ContainerState::Exited, 128, "StartError")
        );
        assert!(status.message.contains("/no/such/program"), "{}", status.message);
        let mut config = sh("other", "");
        config.image = "missing".into();
        let error = world.engine.create_container(&sandbox, config).await.unwrap_err();
        assert!(matches!(error, Error::ImageNotPresent { .. }), "{error}");
        world.engine.remove_container(&id).await.unwrap();
        world.engine.remove_container(&id).await.unwrap();
    });
}

#[test]
fn containers_of_a_pod_share_what_they_should() {
    isolated("containers_of_a_pod_share_what_they_should", async |world| {
        let mut pod = world.pod("share");
        pod.share_process_namespace = true;
        pod.dns = Some(DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["a.b".into()],
            options: vec!["ndots:5".into()],
        });
        pod.sysctls = [("net.core.somaxconn".to_owned(), "77".to_owned())].into();
        let sandbox = world.engine.run_sandbox(pod).await.unwrap();
        let volume = world.dir.join("volume");
        std::fs::create_dir(&volume).unwrap();
        let mut server = sh(
            "server",
            "echo $PPID > /vol/x; echo shm > /dev/shm/x; exec nc -l -p 8080 -e cat",
        );
        server.mounts = vec![Mount {
            host_path: volume.clone(),
            container_path: "/vol".into(),
            readonly: false,
        }];
        let server = world.start_container(&sandbox, server).await;
        let mut other = sh("other", "sleep 1000");
        other.mounts = vec![Mount {
            host_path: volume,
            container_path: "/deep/vol".into(),
            readonly: true,
        }];
        let other = world.start_container(&sandbox, other).await;
        let (_, text) = world
            .sh(
                &other,
                "cat /deep/vol/x /dev/shm/x /etc/resolv.conf /proc/sys/net/core/somaxconn; touch /deep/vol/y",
            )
            .await;
        assert!(
            text.contains("shm\nsearch a.b\nnameserver 10.0.0.10\noptions ndots:5\n77\n") && text.contains("Read-only"),
            "{text}"
        );
        let (_, text) = world.sh(&other, "ps | grep -v grep").await;
        assert!(text.contains("nc -l") && text.contains("oaks-init pause"), "{text}");

        // Port forward and probes reach a listener on the pod's own loopback.
        let mut stream = None;
        until("the port answers", async || {
            world.engine.dial(&sandbox, 8080).await.is_ok()
        })
        .await;
        // The listener serves one connection; the probe above was it. Start another.
        let again = world.run(&sandbox, "again", "exec nc -l -p 8081 -e cat").await;
        let end = Instant::now() + Duration::from_secs(20);
        while stream.is_none() {
            assert!(Instant::now() < end, "no connection");
            stream = world.engine.dial(&sandbox, 8081).await.ok();
        }
        let mut stream = stream.unwrap();
        stream.write_all(b"ping").await.unwrap();
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
        assert!(world.engine.dial(&sandbox, 9).await.is_err());
        for id in [&server, &other, &again] {
            world.engine.stop_container(id, 0).await.unwrap();
        }
        world.engine.remove_sandbox(&sandbox).await.unwrap();
    });
}

/// The process with the engine is killed with SIGKILL at moments spread over a pod's way; its successor must find a clean
/// world: whole pods that run, and nothing of the unfinished one.
#[test]
fn a_killed_engine_leaves_whole_pods_or_nothing() {
    const NAME: &str = "a_killed_engine_leaves_whole_pods_or_nothing";
    isolated(NAME, async |mut world| {
        let (mut running, mut unfinished) = (0, 0);
        for round in 0..8 {
            let mut victim = common::victim(NAME);
            let count = |dir: &str| world.dir.join(dir).read_dir().map_or(0, Iterator::count);
            until("the victim works", async || count("root/containers") > 0).await;
            // Spread over some 50 ms, the time of a pod.
            tokio::time::sleep(Duration::from_millis(7 * round)).await;
            victim.kill().unwrap();
            victim.wait().unwrap();
            world.reopen().await;
            let containers = world.engine.list_containers().await.unwrap();
            for container in &containers {
                match container.state {
                    ContainerState::Running => {
                        assert_eq!(world.sh(&container.id, "echo alive").await, (0, "alive\n".into()));
                        running += 1;
                    }
                    ContainerState::Created => {
                        world.engine.start_container(&container.id).await.unwrap();
                        unfinished += 1;
                    }
                    ContainerState::Exited => {
                        assert_eq!(container.reason, "ContainerStatusUnknown");
                        unfinished += 1;
                    }
                }
            }
            for sandbox in world.engine.list_sandboxes().await.unwrap() {
                assert_eq!(sandbox.state, SandboxState::Ready);
                world.engine.remove_sandbox(&sandbox.id).await.unwrap();
            }
            world.assert_empty();
        }
        println!("{running} running, {unfinished} unfinished containers were found");
        assert!(running > 0);
    });
}
