//! The installer and docker-run.sh, with the real plug-ins and a container tool that is a few lines of shell.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use linux::{
    netlink::{Request, Route},
    netns,
};
use serde_json::{Value, json};

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../scripts").join(name)
}

fn text(out: &Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr)
}

fn sh(dir: &Path, line: &str) {
    let out = Command::new("sh").args(["-c", line]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{line}: {}", text(&out));
}

#[test]
fn the_installer_installs_what_has_its_checksums_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (stage, dist) = (dir.path().join("stage"), dir.path().join("dist"));
    fs::create_dir_all(&stage).unwrap();
    fs::create_dir_all(&dist).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_azure-vnet"), stage.join("azure-vnet")).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_azure-vnet-ipam"), stage.join("azure-vnet-ipam")).unwrap();
    let list = Path::new(env!("CARGO_MANIFEST_DIR")).join("10-azure.conflist");
    fs::copy(list, stage.join("10-azure.conflist")).unwrap();
    let archive = "azure-vnet-cni-linux-amd64-v9.tgz";
    let pack =
        format!("tar -cf - * | gzip -1 > ../dist/{archive} && cd ../dist && sha256sum {archive} > {archive}.sha256");
    sh(&stage, &format!("sha256sum * > SHA256SUMS && {pack}"));

    let (bin, conf) = (dir.path().join("bin"), dir.path().join("conf"));
    let install = |from: &Path, more: &[&str]| {
        Command::new(script("install-cni-plugin.sh"))
            .args(more)
            .arg("--from")
            .arg(from)
            .arg("--bin-dir")
            .arg(&bin)
            .arg("--conf-dir")
            .arg(&conf)
            .output()
            .unwrap()
    };
    let refused = |out: Output, word: &str| {
        assert!(!out.status.success() && text(&out).contains(word), "{}", text(&out));
        assert!(!bin.exists(), "nothing is installed");
    };
    refused(install(&dist, &["v8"]), "there is no file");
    refused(install(&dir.path().join("none"), &[]), "there is no file");
    refused(install(&dist, &["../v9"]), "is no version");
    refused(
        install(&dist, &["v9", "--sha256", &"0".repeat(64)]),
        "does not have the checksum",
    );
    // The archive's own checksum is right, a file in it is not.
    sh(&stage, &format!("echo changed >> azure-vnet-ipam && {pack}"));
    refused(install(&dist, &["v9"]), "checksums that it tells");
    sh(
        &stage,
        &format!("sha256sum azure-vnet azure-vnet-ipam 10-azure.conflist > SHA256SUMS && {pack}"),
    );

    let out = install(&dist, &[]);
    assert!(out.status.success(), "{}", text(&out));
    let file: Value = serde_json::from_slice(&fs::read(conf.join("10-azure.conflist")).unwrap()).unwrap();
    assert_eq!(file["plugins"][0]["bridge"], "azure0");
    assert_eq!(
        fs::metadata(bin.join("azure-vnet")).unwrap().permissions().mode() & 0o777,
        0o755
    );
    fs::write(conf.join("10-azure.conflist"), "mine").unwrap();
    assert!(install(&dist.join(archive), &["v9"]).status.success(), "again, by file");
    assert_eq!(fs::read_to_string(conf.join("10-azure.conflist")).unwrap(), "mine");
}

/// `run` starts a process in a network namespace of its own, `inspect` knows it, `rm` ends it.
const TOOL: &str = r#"#!/bin/sh
set -e
state=$(dirname "$0")/state
case "$1" in
run)
    while [ "$1" != --name ]; do shift; done
    name=$2
    [ "$3" != missing ] || { echo "no such image" >&2; exit 125; }
    unshare --net sleep 1000 >/dev/null 2>&1 &
    pid=$!
    mkdir -p "$state"
    echo $pid > "$state/$name"
    while [ "$(readlink /proc/$pid/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done
    echo "0123456789abcdef$name" ;;
inspect)
    [ -f "$state/$4" ] || exit 1
    case "$3" in *Id*) echo "0123456789abcdef$4" ;; *) cat "$state/$4" ;; esac ;;
rm)
    kill "$(cat "$state/$3")"
    rm "$state/$3" ;;
esac
"#;

#[test]
fn docker_run_connects_a_container_and_takes_it_away() {
    let body = || {
        netns::become_private_host(&[Path::new("/run")]).unwrap();
        let dir = tempfile::tempdir_in("/run").unwrap();
        // Any link will do for a NIC here.
        let mut host = Route::open().unwrap();
        host.run(Request::create_bridge("nic0", [2, 0, 0, 0, 0, 7], None))
            .unwrap();
        let tool = dir.path().join("docker");
        fs::write(&tool, TOOL).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        let conflist = dir.path().join("list");
        let list = |master: &str| {
            let list = json!({"cniVersion": "1.0.0", "name": "azure", "plugins": [{"type": "azure-vnet", "master": master,
                "mode": "bridge", "bridge": "azure0", "stateDir": "/run/state", "ipam": {"type": "azure-vnet-ipam",
                "pools": [{"subnet": "10.1.0.0/24", "addresses": ["10.1.0.9"]}]}}]});
            fs::write(&conflist, list.to_string()).unwrap();
        };
        let run = |args: &[&str]| {
            Command::new(script("docker-run.sh"))
                .args(args)
                .env("CONTAINER_TOOL", &tool)
                .env("CNI_CONFLIST", &conflist)
                .env(
                    "CNI_PATH",
                    Path::new(env!("CARGO_BIN_EXE_azure-vnet")).parent().unwrap(),
                )
                .output()
                .unwrap()
        };
        let mut pods = || {
            let links = host.links().unwrap();
            links.iter().filter(|l| l.name.starts_with("azv")).count()
        };
        list("nic0");
        assert!(!run(&["web", "ns"]).status.success(), "usage");
        let out = run(&["web", "ns", "missing"]);
        assert!(
            !out.status.success() && text(&out).contains("no such image"),
            "{}",
            text(&out)
        );
        let out = run(&["web", "ns", "image"]);
        assert!(
            out.status.success() && text(&out).contains("10.1.0.9/24"),
            "{}",
            text(&out)
        );
        assert_eq!(pods(), 1);
        let out = run(&["second", "ns", "image"]);
        assert!(
            text(&out).contains("second : error executing ADD: failed to allocate address"),
            "{}",
            text(&out)
        );
        assert!(
            !out.status.success() && !dir.path().join("state/second").exists(),
            "and undone"
        );
        let out = run(&["--delete", "web", "ns"]);
        assert!(out.status.success(), "{}", text(&out));
        assert_eq!(pods(), 0);
        assert!(!dir.path().join("state/web").exists());
        assert!(!run(&["--delete", "web", "ns"]).status.success());
    };
    std::thread::spawn(body).join().unwrap();
}
