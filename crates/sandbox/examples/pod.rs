//! Runs pods with the embedded engine in namespaces of its own, and prints what each step takes.
//!
//!     cargo build -p sandbox --bins && cargo run -p sandbox --example pod [COUNT]
//!
//! Needs root, busybox (static) and `unshare`. Nothing is left behind.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use sandbox::{
    ContainerConfig, ContainerState, PodIdentity, Runtime, SandboxConfig,
    embedded::{Engine, EngineConfig, NoNetwork},
    images::{BuildSpec, ImageConfig, LayerSource, Store},
    supervisor::client::Client,
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const INSIDE: &str = "OAKS_EXAMPLE_DIR";

fn main() -> Result<()> {
    let count = std::env::args().nth(1).map_or(Ok(20), |text| text.parse())?;
    if let Some(dir) = std::env::var_os(INSIDE) {
        return tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?
            .block_on(demo(Path::new(&dir), count));
    }
    let dir = std::env::temp_dir().join(format!("oaks-pod-{}", std::process::id()));
    std::fs::create_dir_all(&dir)?;
    let status = Command::new("unshare")
        .args([
            "--mount",
            "--pid",
            "--net",
            "--ipc",
            "--uts",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ])
        .arg(std::env::current_exe()?)
        .arg(count.to_string())
        .env(INSIDE, &dir)
        .status()?;
    let group = linux::cgroup::Hierarchy::detect()?.group(group_name(&dir))?;
    group.kill_all(Duration::from_secs(5))?;
    group.remove()?;
    std::fs::remove_dir_all(&dir)?;
    if status.success() {
        Ok(())
    } else {
        Err("the demo failed".into())
    }
}

fn group_name(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

async fn demo(dir: &Path, count: usize) -> Result<()> {
    let bins = std::env::current_exe()?
        .parent()
        .and_then(Path::parent)
        .map(Path::to_owned)
        .unwrap_or_default();
    let mut init = Command::new(bins.join("oaks-init"))
        .arg("--socket")
        .arg(dir.join("init.sock"))
        .arg("--state")
        .arg(dir.join("init"))
        .spawn()
        .map_err(|error| {
            format!(
                "{}: {error}; build it with: cargo build -p sandbox --bins",
                bins.join("oaks-init").display()
            )
        })?;
    let client = Client::new(dir.join("init.sock"));
    let end = Instant::now() + Duration::from_secs(5);
    while client.hello().is_err() && Instant::now() < end {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let store = Store::open(dir.join("images"))?;
    let start = Instant::now();
    store.build(&busybox(dir)?)?;
    println!("image built and unpacked in {:.1} ms", ms(start));
    let engine = Engine::open(EngineConfig {
        root: dir.join("root"),
        run_dir: dir.join("run"),
        supervisor_socket: dir.join("init.sock"),
        cgroup_parent: group_name(dir),
        runc: bins.join("oaks-runc"),
        init: bins.join("oaks-init"),
        network: Arc::new(NoNetwork),
        images: store,
        shared_images: None,
    })
    .await?;

    let mut times: [Vec<f64>; 5] = Default::default();
    for number in 0..count {
        let name = format!("pod-{number}");
        let pod = SandboxConfig {
            pod: PodIdentity {
                uid: name.clone(),
                namespace: "demo".into(),
                name: name.clone(),
                attempt: 0,
            },
            hostname: name,
            log_directory: dir.join("logs"),
            ..SandboxConfig::default()
        };
        let config = ContainerConfig {
            name: "main".into(),
            image: "busybox".into(),
            command: ["sh", "-c", "echo hello from $HOSTNAME; exec sleep 1000"]
                .map(String::from)
                .to_vec(),
            log_path: format!("{number}.log").into(),
            ..ContainerConfig::default()
        };
        let start = Instant::now();
        let sandbox = engine.run_sandbox(pod).await?;
        times[0].push(ms(start));
        let start = Instant::now();
        let id = engine.create_container(&sandbox, config).await?;
        times[1].push(ms(start));
        let start = Instant::now();
        engine.start_container(&id).await?;
        times[2].push(ms(start));
        let start = Instant::now();
        let (code, _, _) = engine.exec_sync(&id, vec!["true".into()], 5000).await?;
        times[3].push(ms(start));
        let status = engine.container_status(&id).await?;
        if code != 0 || status.state != ContainerState::Running {
            return Err(format!("pod {number}: {status:?}").into());
        }
        if number + 1 == count {
            println!("log: {}", std::fs::read_to_string(&status.log_path)?.trim_end());
            println!("stats: {:?}", engine.container_stats(&id).await?);
        }
        let start = Instant::now();
        engine.remove_sandbox(&sandbox).await?;
        times[4].push(ms(start));
    }
    for (name, mut times) in [
        "run sandbox",
        "create container",
        "start container",
        "exec true",
        "stop and remove",
    ]
    .iter()
    .zip(times)
    {
        times.sort_by(f64::total_cmp);
        println!(
            "{name:>17}: median {:6.1} ms, min {:6.1}",
            times[times.len() / 2],
            times[0]
        );
    }
    drop(engine);
    init.kill()?;
    init.wait()?;
    Ok(())
}

fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn busybox(dir: &Path) -> Result<BuildSpec> {
    let bin = dir.join("busybox/bin");
    std::fs::create_dir_all(&bin)?;
    let program = ["/bin/busybox", "/usr/bin/busybox"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists());
    std::fs::copy(program.ok_or("busybox is not installed")?, bin.join("busybox"))?;
    for applet in ["sh", "sleep", "true", "echo"] {
        symlink("busybox", bin.join(applet))?;
    }
    Ok(BuildSpec {
        reference: "busybox".into(),
        layers: vec![LayerSource::Directory(dir.join("busybox"))],
        config: ImageConfig::default(),
    })
}
