//! Image recipes: a root file system put together from Debian packages and files of one's own, without a registry, a
//! daemon or root privileges beyond unpacking. Packages are downloaded by apt by name and only unpacked: no maintainer
//! script runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

/// `image.yaml`: what `oaks image build DIR` reads.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Recipe {
    /// `front:1`.
    pub name: String,
    /// Debian packages; their dependencies come along.
    #[serde(default)]
    pub packages: Vec<String>,
    #[serde(default)]
    pub files: Vec<RecipeFile>,
    /// Directories to create.
    #[serde(default)]
    pub directories: Vec<PathBuf>,
    #[serde(default)]
    pub entrypoint: Vec<String>,
    #[serde(default)]
    pub cmd: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    #[serde(default)]
    pub working_dir: Option<String>,
    #[serde(default)]
    pub user: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RecipeFile {
    /// Relative to the recipe's folder.
    pub from: PathBuf,
    /// Absolute path in the image.
    pub to: PathBuf,
    #[serde(default = "readable")]
    pub mode: u32,
}

fn readable() -> u32 {
    0o644
}

/// Packages that only serve installation and configuration, which never happens here.
const NOT_UNPACKED: &[&str] = &[
    "adduser",
    "cdebconf",
    "debconf",
    "debianutils",
    "dpkg",
    "gcc-12-base",
    "init-system-helpers",
    "install-info",
    "iproute2",
    "lsb-base",
    "mount",
    "passwd",
    "perl",
    "perl-base",
    "perl-modules-5.36",
    "readline-common",
    "sensible-utils",
    "sysvinit-utils",
    "systemd",
    "tar",
    "ucf",
    "util-linux",
];

impl Recipe {
    /// Reads `DIR/image.yaml`; unknown keys are errors.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("image.yaml");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        serde_saphyr::from_str(&text).with_context(|| format!("{} is not an image recipe", path.display()))
    }

    /// Puts the root file system together in `rootfs` (made empty first); `cache` keeps downloaded packages.
    pub fn assemble(&self, dir: &Path, rootfs: &Path, cache: &Path) -> Result<()> {
        if rootfs.exists() {
            fs::remove_dir_all(rootfs).with_context(|| format!("emptying {}", rootfs.display()))?;
        }
        for sub in [
            "", "etc", "proc", "sys", "dev", "tmp", "run", "var/run", "var/log", "root",
        ] {
            fs::create_dir_all(rootfs.join(sub))?;
        }
        fs::set_permissions(rootfs.join("tmp"), fs::Permissions::from_mode(0o1777))?;
        if !self.packages.is_empty() {
            fs::create_dir_all(cache)?;
            for deb in download(&self.packages, cache)? {
                let out = Command::new("dpkg")
                    .arg("-x")
                    .arg(&deb)
                    .arg(rootfs)
                    .output()
                    .context("starting dpkg")?;
                if !out.status.success() {
                    bail!(
                        "dpkg -x {} failed: {}",
                        deb.display(),
                        String::from_utf8_lossy(&out.stderr).trim()
                    );
                }
            }
        }
        for d in &self.directories {
            fs::create_dir_all(inside(rootfs, d))?;
        }
        let passwd = rootfs.join("etc/passwd");
        if !passwd.exists() {
            fs::write(
                &passwd,
                "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/:/bin/false\nnobody:x:65534:65534:nobody:/:/bin/false\n",
            )?;
            fs::write(
                rootfs.join("etc/group"),
                "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n",
            )?;
        }
        // What busybox's own installer would do, for the shell that scripts name in their first line.
        for busybox in ["bin/busybox", "usr/bin/busybox"] {
            let sh = rootfs.join("bin/sh");
            if rootfs.join(busybox).exists() && fs::symlink_metadata(&sh).is_err() {
                fs::create_dir_all(rootfs.join("bin"))?;
                std::os::unix::fs::symlink(format!("/{busybox}"), &sh)?;
            }
        }
        for file in &self.files {
            let to = inside(rootfs, &file.to);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            let _ = fs::remove_file(&to);
            fs::copy(dir.join(&file.from), &to).with_context(|| format!("copying {}", file.from.display()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(file.mode))?;
        }
        Ok(())
    }
}

fn inside(rootfs: &Path, path: &Path) -> PathBuf {
    rootfs.join(path.strip_prefix("/").unwrap_or(path))
}

/// Names of the packages and all they depend on, less [`NOT_UNPACKED`].
fn closure(packages: &[String]) -> Result<BTreeSet<String>> {
    let mut args = vec!["depends", "--recurse"];
    args.extend(
        ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"].map(|k| match k {
            "recommends" => "--no-recommends",
            "suggests" => "--no-suggests",
            "conflicts" => "--no-conflicts",
            "breaks" => "--no-breaks",
            "replaces" => "--no-replaces",
            _ => "--no-enhances",
        }),
    );
    args.extend(packages.iter().map(String::as_str));
    let out = Command::new("apt-cache")
        .args(&args)
        .output()
        .context("starting apt-cache (images are built from Debian packages)")?;
    if !out.status.success() {
        bail!(
            "apt-cache knows no such package: {}; run `apt-get update`",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text
        .lines()
        .filter(|l| l.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()))
        .map(|l| l.trim().to_owned())
        .filter(|p| !NOT_UNPACKED.contains(&p.as_str()))
        .collect())
}

/// Downloads into `cache` what is not there yet; paths of all needed archives.
fn download(packages: &[String], cache: &Path) -> Result<Vec<PathBuf>> {
    let wanted = closure(packages)?;
    let have = |name: &str| -> Option<PathBuf> {
        let prefix = format!("{name}_");
        fs::read_dir(cache).ok()?.flatten().map(|e| e.path()).find(|p| {
            p.file_name()
                .and_then(|n| n.to_str())
                .is_some_and(|n| n.starts_with(&prefix) && n.ends_with(".deb"))
        })
    };
    let missing: Vec<&String> = wanted.iter().filter(|n| have(n).is_none()).collect();
    if !missing.is_empty() {
        let mut last = String::new();
        let done = (0..3).any(|_| {
            // Download as root into a folder of root: without the option apt warns and drops to _apt, which cannot write there.
            let out = Command::new("apt-get")
                .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
                .args(&missing)
                .current_dir(cache)
                .output();
            match out {
                Ok(o) if o.status.success() => true,
                Ok(o) => {
                    last = String::from_utf8_lossy(&o.stderr).trim().to_owned();
                    false
                }
                Err(e) => {
                    last = e.to_string();
                    false
                }
            }
        });
        if !done {
            bail!("apt-get download failed three times: {last}");
        }
    }
    wanted
        .iter()
        .map(|n| have(n).with_context(|| format!("package {n} was downloaded under another name")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("image.yaml"), "name: a:1\npackage: [x]\n").unwrap();
        let err = format!("{:#}", Recipe::read(dir.path()).unwrap_err());
        assert!(err.contains("package") && err.contains("image.yaml"), "{err}");
    }

    #[test]
    fn files_land_where_the_recipe_says() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.conf"), "x").unwrap();
        fs::write(
            dir.path().join("image.yaml"),
            "name: a:1\nfiles: [{from: a.conf, to: /etc/a/a.conf, mode: 0o600}]\n",
        )
        .unwrap();
        let recipe = Recipe::read(dir.path()).unwrap();
        let root = dir.path().join("root");
        recipe.assemble(dir.path(), &root, &dir.path().join("cache")).unwrap();
        let meta = fs::metadata(root.join("etc/a/a.conf")).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    }
}
