//! The OCI runtime specification of a container, from what the pod asks for and what the image says. No IO.
//!
//! # Source
//! OCI runtime-spec 1.2 `config.md`, `config-linux.md`; defaults as the CRI runtimes have them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::user::User;
use crate::{
    api::{ContainerConfig, Error, Seccomp, Security},
    images::ImageConfig,
    runc::{CGROUPS_PATH, DEFAULT_PATH, SETUP, set_of},
};

/// What a container keeps unless its pod says otherwise. MKNOD is left out where devices cannot be fenced (version 2 groups).
const DEFAULT_CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// Every capability the kernel has, in its order.
pub const ALL_CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Devices a container may use: making any node, and the harmless ones.
pub const DEVICE_RULES: [&str; 11] = [
    "c *:* m",
    "b *:* m",
    "c 1:3 rwm",
    "c 1:5 rwm",
    "c 1:7 rwm",
    "c 1:8 rwm",
    "c 1:9 rwm",
    "c 5:0 rwm",
    "c 5:1 rwm",
    "c 5:2 rwm",
    "c 136:* rwm",
];

const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Where a container's surroundings are: made by the engine beforehand.
pub struct Surroundings<'a> {
    pub rootfs: &'a Path,
    pub hostname: &'a str,
    /// Pinned namespaces; `None` for the network means the host's.
    pub netns: Option<&'a Path>,
    pub ipcns: &'a Path,
    pub utsns: &'a Path,
    /// `Some` if the pod shares one pid namespace.
    pub pidns: Option<&'a Path>,
    pub shm: &'a Path,
    /// Files of the pod that appear under /etc unless the pod mounts its own.
    pub etc_files: &'a [(&'static str, PathBuf)],
    /// The kernel fences devices (version 1 groups).
    pub fences_devices: bool,
    /// Capabilities the host lets us hand on.
    pub available: &'a BTreeSet<String>,
}

/// What `config.json` and `oaks.json` are written from.
pub struct Planned {
    pub spec: Value,
    pub capabilities: BTreeSet<String>,
    pub seccomp: bool,
}

pub fn plan(
    config: &ContainerConfig,
    image: &ImageConfig,
    user: &User,
    around: &Surroundings<'_>,
) -> Result<Planned, Error> {
    let security = &config.security;
    let capabilities = capabilities(security, around)?;
    let seccomp = match &security.seccomp {
        _ if security.privileged => false,
        Seccomp::RuntimeDefault => true,
        Seccomp::Unconfined => false,
        Seccomp::Localhost(profile) => {
            return Err(Error::Unsupported {
                feature: format!("seccomp profile Localhost {profile:?}"),
            });
        }
    };
    let args = command(config, image)?;
    let process = process(&args, config, image, user, &capabilities, around);
    let mut linux = json!({
        "cgroupsPath": CGROUPS_PATH,
        "namespaces": namespaces(around),
    });
    if !security.privileged {
        linux["maskedPaths"] = json!(MASKED);
        linux["readonlyPaths"] = json!(READ_ONLY);
    }
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": around.rootfs, "readonly": security.readonly_rootfs },
        "process": process,
        "mounts": mounts(config, around),
        "linux": linux,
    });
    Ok(Planned {
        spec,
        capabilities,
        seccomp,
    })
}

/// Entrypoint and arguments: the pod's `command` replaces the image's entrypoint and drops its cmd; `args` replace cmd.
fn command(config: &ContainerConfig, image: &ImageConfig) -> Result<Vec<String>, Error> {
    let mut argv = if config.command.is_empty() {
        image.entrypoint.clone()
    } else {
        config.command.clone()
    };
    if !config.args.is_empty() {
        argv.extend(config.args.iter().cloned());
    } else if config.command.is_empty() {
        argv.extend(image.cmd.iter().cloned());
    }
    if argv.first().is_none_or(String::is_empty) {
        return Err(Error::Invalid {
            field: "command".to_owned(),
            reason: "neither the container nor its image names a program".to_owned(),
        });
    }
    Ok(argv)
}

/// The `process` object for a command in this container, the first or a later one.
pub fn process(
    args: &[String],
    config: &ContainerConfig,
    image: &ImageConfig,
    user: &User,
    capabilities: &BTreeSet<String>,
    around: &Surroundings<'_>,
) -> Value {
    // While it is set up it holds more, see `runc::executor`.
    let held: Vec<String> = capabilities
        .iter()
        .map(String::as_str)
        .chain(SETUP)
        .collect::<BTreeSet<_>>()
        .into_iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    json!({
        "terminal": config.tty,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups, "umask": 0o022 },
        "args": args,
        "env": environment(config, image, around.hostname),
        "cwd": working_dir(config, image),
        "noNewPrivileges": config.security.no_new_privs,
        "capabilities": { "bounding": held, "permitted": held, "effective": held, "inheritable": [], "ambient": [] },
    })
}

/// Absolute path.
pub fn working_dir(config: &ContainerConfig, image: &ImageConfig) -> String {
    let given = config
        .working_dir
        .as_deref()
        .filter(|dir| !dir.is_empty())
        .unwrap_or(&image.working_dir);
    match given {
        "" => "/".to_owned(),
        absolute if absolute.starts_with('/') => absolute.to_owned(),
        relative => format!("/{relative}"),
    }
}

/// The image's variables, then the container's over them, order kept; PATH and HOSTNAME always, TERM with a terminal.
fn environment(config: &ContainerConfig, image: &ImageConfig, hostname: &str) -> Vec<String> {
    let mut env: Vec<(String, String)> = vec![
        ("PATH".into(), DEFAULT_PATH.into()),
        ("HOSTNAME".into(), hostname.into()),
    ];
    if config.tty {
        env.push(("TERM".into(), "xterm".into()));
    }
    let image = image
        .env
        .iter()
        .map(|entry| entry.split_once('=').unwrap_or((entry, "")));
    let own = config.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in image.chain(own) {
        match env.iter_mut().find(|(known, _)| known == name) {
            Some((_, known)) => *known = value.to_owned(),
            None => env.push((name.to_owned(), value.to_owned())),
        }
    }
    env.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// What the container keeps: names without `CAP_`.
fn capabilities(security: &Security, around: &Surroundings<'_>) -> Result<BTreeSet<String>, Error> {
    if security.privileged {
        return Ok(around.available.clone());
    }
    let plain = |name: &String| name.trim_start_matches("CAP_").to_ascii_uppercase();
    let check = |field: &str, name: &str| match set_of(name).is_empty() {
        true => Err(Error::Invalid {
            field: field.to_owned(),
            reason: format!("{name:?} is no capability"),
        }),
        false => Ok(()),
    };
    let mut kept: BTreeSet<String> = DEFAULT_CAPABILITIES.iter().map(|name| (*name).to_owned()).collect();
    if around.fences_devices {
        kept.insert("MKNOD".to_owned());
    }
    let (add, drop) = (
        security.add_capabilities.iter().map(plain),
        security.drop_capabilities.iter().map(plain),
    );
    let (add, drop): (Vec<String>, Vec<String>) = (add.collect(), drop.collect());
    if add.iter().any(|name| name == "ALL") {
        kept.extend(around.available.iter().cloned());
    }
    if drop.iter().any(|name| name == "ALL") {
        kept.clear();
        // Dropping all and adding all leaves what was added.
        if add.iter().any(|name| name == "ALL") {
            kept.extend(around.available.iter().cloned());
        }
    }
    for name in drop.iter().filter(|name| *name != "ALL") {
        check("capabilities.drop", name)?;
        kept.remove(name);
    }
    for name in add.iter().filter(|name| *name != "ALL") {
        check("capabilities.add", name)?;
        if !around.available.contains(name) {
            let reason = format!("this host does not have CAP_{name} to give");
            return Err(Error::Invalid {
                field: "capabilities.add".to_owned(),
                reason,
            });
        }
        kept.insert(name.clone());
    }
    kept.retain(|name| around.available.contains(name));
    Ok(kept)
}

fn namespaces(around: &Surroundings<'_>) -> Value {
    let mut list = vec![
        json!({ "type": "mount" }),
        json!({ "type": "ipc", "path": around.ipcns }),
        json!({ "type": "uts", "path": around.utsns }),
    ];
    list.extend(around.netns.map(|path| json!({ "type": "network", "path": path })));
    list.push(match around.pidns {
        Some(path) => json!({ "type": "pid", "path": path }),
        None => json!({ "type": "pid" }),
    });
    Value::Array(list)
}

fn mounts(config: &ContainerConfig, around: &Surroundings<'_>) -> Value {
    let mount = |kind: &str, at: &str, options: &[&str]| json!({ "type": kind, "source": kind, "destination": at, "options": options });
    let bind = |source: &Path, at: &Path, readonly: bool| {
        let mode = if readonly { "ro" } else { "rw" };
        json!({ "type": "bind", "source": source, "destination": at, "options": ["rbind", "rprivate", mode] })
    };
    let sysfs = if config.security.privileged { "rw" } else { "ro" };
    let mut list = vec![
        mount("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "devpts",
            "/dev/pts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", sysfs]),
    ];
    list.push(bind(around.shm, Path::new("/dev/shm"), false));
    for (name, source) in around.etc_files {
        let at = Path::new(name);
        if !config.mounts.iter().any(|mount| mount.container_path == at) {
            list.push(bind(source, at, config.security.readonly_rootfs));
        }
    }
    // Outer mounts first, whatever order the pod lists them in.
    let mut own: Vec<_> = config.mounts.iter().collect();
    own.sort_by_key(|mount| mount.container_path.components().count());
    list.extend(
        own.into_iter()
            .map(|mount| bind(&mount.host_path, &mount.container_path, mount.readonly)),
    );
    Value::Array(list)
}

/// `SIGTERM`, `TERM` or a number; SIGTERM if it is none of these.
pub fn stop_signal(name: &str) -> i32 {
    if let Ok(number @ 1..=64) = name.parse() {
        return number;
    }
    match name.trim_start_matches("SIG") {
        "HUP" => libc::SIGHUP,
        "INT" => libc::SIGINT,
        "QUIT" => libc::SIGQUIT,
        "KILL" => libc::SIGKILL,
        "USR1" => libc::SIGUSR1,
        "USR2" => libc::SIGUSR2,
        "WINCH" => libc::SIGWINCH,
        "PWR" => libc::SIGPWR,
        "STOP" => libc::SIGSTOP,
        name => match name.strip_prefix("RTMIN+").and_then(|plus| plus.parse::<i32>().ok()) {
            // Numbered from 34 in both C libraries.
            Some(plus @ 0..=30) => 34 + plus,
            _ => libc::SIGTERM,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Mount;

    fn planned(config: ContainerConfig, image: ImageConfig) -> Result<Planned, Error> {
        let available = ALL_CAPABILITIES
            .iter()
            .filter(|name| **name != "SYS_RESOURCE")
            .map(|name| (*name).to_owned())
            .collect();
        let around = Surroundings {
            rootfs: Path::new("/r"),
            hostname: "pod",
            netns: Some(Path::new("/n/net")),
            ipcns: Path::new("/n/ipc"),
            utsns: Path::new("/n/uts"),
            pidns: None,
            shm: Path::new("/n/shm"),
            etc_files: &[
                ("/etc/resolv.conf", PathBuf::from("/n/resolv.conf")),
                ("/etc/hosts", PathBuf::from("/n/hosts")),
            ],
            fences_devices: false,
            available: &available,
        };
        plan(&config, &image, &User::default(), &around)
    }

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn commands_merge_as_pods_expect() {
        let image = ImageConfig {
            entrypoint: strings(&["/entry"]),
            cmd: strings(&["a", "b"]),
            ..ImageConfig::default()
        };
        for (command, args, want) in [
            (&[][..], &[][..], &["/entry", "a", "b"][..]),
            (&[], &["x"], &["/entry", "x"]),
            (&["/own"], &[], &["/own"]),
            (&["/own"], &["x"], &["/own", "x"]),
        ] {
            let config = ContainerConfig {
                command: strings(command),
                args: strings(args),
                ..ContainerConfig::default()
            };
            assert_eq!(
                planned(config, image.clone()).unwrap().spec["process"]["args"],
                json!(want)
            );
        }
        assert!(matches!(
            planned(ContainerConfig::default(), ImageConfig::default()),
            Err(Error::Invalid { .. })
        ));
    }

    fn sh(security: Security) -> ContainerConfig {
        ContainerConfig {
            command: strings(&["sh"]),
            security,
            ..ContainerConfig::default()
        }
    }

    #[test]
    fn environment_and_directory_come_from_image_then_container() {
        let image = ImageConfig {
            env: strings(&["A=1", "PATH=/x"]),
            working_dir: "srv".into(),
            ..ImageConfig::default()
        };
        let config = ContainerConfig {
            env: vec![("A".into(), "2=3".into()), ("B".into(), "".into())],
            tty: true,
            ..sh(Security::default())
        };
        let spec = planned(config, image).unwrap().spec;
        assert_eq!(
            spec["process"]["env"],
            json!(["PATH=/x", "HOSTNAME=pod", "TERM=xterm", "A=2=3", "B="])
        );
        assert_eq!(spec["process"]["cwd"], "/srv");
    }

    #[test]
    fn capabilities_are_added_dropped_and_refused() {
        let caps = |add: &[&str], drop: &[&str], privileged| {
            let security = Security {
                add_capabilities: strings(add),
                drop_capabilities: strings(drop),
                privileged,
                ..Security::default()
            };
            planned(sh(security), ImageConfig::default()).map(|planned| planned.capabilities)
        };
        assert_eq!(caps(&[], &[], false).unwrap().len(), DEFAULT_CAPABILITIES.len());
        assert_eq!(
            caps(&["CAP_NET_ADMIN"], &["ALL"], false).unwrap(),
            BTreeSet::from(["NET_ADMIN".to_owned()])
        );
        assert!(!caps(&[], &["NET_RAW"], false).unwrap().contains("NET_RAW"));
        assert_eq!(caps(&["ALL"], &[], false).unwrap().len(), 40);
        assert_eq!(caps(&[], &[], true).unwrap().len(), 40);
        assert!(matches!(
            caps(&["SYS_RESOURCE"], &[], false),
            Err(Error::Invalid { .. })
        ));
        assert!(matches!(caps(&["NONSENSE"], &[], false), Err(Error::Invalid { .. })));
    }

    #[test]
    fn profiles_that_cannot_be_applied_are_refused() {
        let with = |seccomp, privileged| {
            planned(
                sh(Security {
                    seccomp,
                    privileged,
                    ..Security::default()
                }),
                ImageConfig::default(),
            )
            .map(|planned| planned.seccomp)
        };
        assert!(with(Seccomp::RuntimeDefault, false).unwrap());
        assert!(!with(Seccomp::Unconfined, false).unwrap() && !with(Seccomp::RuntimeDefault, true).unwrap());
        assert!(matches!(
            with(Seccomp::Localhost("x.json".into()), false),
            Err(Error::Unsupported { .. })
        ));
    }

    #[test]
    fn a_pods_own_mount_replaces_the_generated_file_and_outer_mounts_come_first() {
        let mount = |at: &str| Mount {
            host_path: "/h".into(),
            container_path: at.into(),
            readonly: true,
        };
        let config = ContainerConfig {
            mounts: vec![mount("/data/in"), mount("/etc/hosts"), mount("/data")],
            ..sh(Security::default())
        };
        let spec = planned(config, ImageConfig::default()).unwrap().spec;
        let at: Vec<&str> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|mount| mount["destination"].as_str())
            .collect();
        assert_eq!(at.iter().filter(|at| **at == "/etc/hosts").count(), 1);
        let place = |path| at.iter().position(|at| *at == path).unwrap();
        assert!(place("/data") < place("/data/in") && place("/dev") < place("/dev/shm"));
    }

    #[test]
    fn stop_signals_have_names_and_numbers() {
        for (name, want) in [
            ("", 15),
            ("SIGQUIT", 3),
            ("INT", 2),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("rubbish", 15),
            ("0", 15),
        ] {
            assert_eq!(stop_signal(name), want, "{name}");
        }
    }

    /// The container library must read what we write.
    #[test]
    fn the_library_understands_the_specification() {
        let planned = planned(sh(Security::default()), ImageConfig::default()).unwrap();
        let spec: libcontainer::oci_spec::runtime::Spec = serde_json::from_value(planned.spec).unwrap();
        libcontainer::validator::Validator::validate_spec(&spec).unwrap();
    }
}
