//! The callers: built Go programs and Debian's packages, unpacked and not installed.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use testkit::debian;

/// Paths that the whole run shares.
pub struct Tools {
    /// Where `azure-vnet` and `azure-vnet-ipam` were installed.
    pub plugins: PathBuf,
    /// The documented list, as installed.
    pub conflist: PathBuf,
    /// Go programs: `cnitool`, `crirun`, `integration.test`, `kubelet`.
    pub peers: PathBuf,
}

const PLUGINS: &[&str] = &["containernetworking-plugins"];
const PODMAN: &[&str] = &[
    "podman",
    "conmon",
    "crun",
    "libyajl2",
    "golang-github-containers-common",
    "golang-github-containers-image",
    "libgpgme11",
    "libassuan0",
    "libsubid4",
    "libseccomp2",
    "libdevmapper1.02.1",
];
const CONTAINERD: &[&str] = &["containerd", "runc", "libseccomp2"];

impl Tools {
    /// Downloads an area's packages; called outside, where there is a network.
    pub fn fetch(&self, area: &str) {
        debian::unpack(PLUGINS);
        debian::iptables();
        match area {
            "podman" => drop(debian::unpack(PODMAN)),
            "containerd" | "kubelet" => drop(debian::unpack(CONTAINERD)),
            _ => {}
        }
    }

    /// For this program's second start, inside a host.
    pub fn arguments(&self, area: &str) -> Vec<PathBuf> {
        let pairs: [(&str, &Path); 4] = [
            ("--plugins", &self.plugins),
            ("--conflist", &self.conflist),
            ("--tools", &self.peers),
            ("--inside", Path::new(area)),
        ];
        pairs
            .iter()
            .flat_map(|(k, v)| [PathBuf::from(k), v.to_path_buf()])
            .collect()
    }

    pub fn peer(&self, name: &str) -> PathBuf {
        self.peers.join(name)
    }

    /// Debian's reference plug-ins.
    pub fn reference_plugins(&self) -> PathBuf {
        debian::unpack(PLUGINS).join("usr/lib/cni")
    }

    pub fn podman(&self) -> PathBuf {
        debian::unpack(PODMAN)
    }

    pub fn containerd(&self) -> PathBuf {
        debian::unpack(CONTAINERD)
    }
}

/// Writes a program that runs `command` with the caller's arguments.
pub fn wrapper(path: &Path, text: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// `iptables` and `ip6tables` that find the libraries they were unpacked with, whatever environment their caller has.
pub fn iptables_wrappers(dir: &Path) -> Result<()> {
    let found = debian::iptables();
    for name in ["iptables", "ip6tables"] {
        let program = found.bin.join(name);
        wrapper(
            &dir.join(name),
            &format!(
                "LD_LIBRARY_PATH={} XTABLES_LIBDIR={} exec {} \"$@\"",
                found.lib.display(),
                found.extensions.display(),
                program.display()
            ),
        )?;
    }
    Ok(())
}

/// The folder of libraries below an unpacked root.
pub fn libraries(root: &Path) -> PathBuf {
    let lib = root.join("usr/lib");
    fs::read_dir(&lib)
        .into_iter()
        .flatten()
        .flatten()
        .map(|e| e.path())
        .find(|p| p.to_string_lossy().ends_with("-linux-gnu"))
        .unwrap_or(lib)
}

/// Standard output; an error tells everything the program said.
pub fn output(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let out = command.output()?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    if !out.status.success() {
        anyhow::bail!(
            "{} ended with {}: {text}{}",
            shown.split_whitespace().take(6).collect::<Vec<_>>().join(" "),
            out.status,
            String::from_utf8_lossy(&out.stderr)
        );
    }
    Ok(text)
}
