//! The lower layer of a machine's root: a minimal tree that Oaks builds from its own binaries and the shared libraries
//! they need. Never the host's root: what is not listed here does not exist in a machine.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use thiserror::Error;

/// What a machine runs, on the host.
#[derive(Clone, Debug)]
pub struct Binaries {
    pub oaks: PathBuf,
    pub init: PathBuf,
    pub runc: PathBuf,
    pub cni: PathBuf,
    pub cni_ipam: PathBuf,
}

#[derive(Debug, Error)]
pub enum TreeError {
    #[error("{program} is missing at {path}; build it with `cargo build --workspace --bins` or set OAKS_LIBEXEC")]
    MissingBinary { program: &'static str, path: PathBuf },
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl Binaries {
    /// Finds the helper binaries beside `oaks` (or in `libexec` if given).
    pub fn beside(oaks: &Path, libexec: Option<&Path>) -> Result<Self, TreeError> {
        let dir = libexec
            .map(Path::to_path_buf)
            .unwrap_or_else(|| oaks.parent().unwrap_or(Path::new("/")).to_path_buf());
        let find = |program: &'static str| {
            let path = dir.join(program);
            if path.is_file() {
                Ok(path)
            } else {
                Err(TreeError::MissingBinary { program, path })
            }
        };
        Ok(Self {
            oaks: oaks.to_path_buf(),
            init: find("oaks-init")?,
            runc: find("oaks-runc")?,
            cni: find("azure-vnet")?,
            cni_ipam: find("azure-vnet-ipam")?,
        })
    }

    /// `(source on the host, path in the machine)`.
    fn placed(&self) -> [(&Path, &'static str); 5] {
        [
            (&self.oaks, "usr/bin/oaks"),
            (&self.init, "usr/sbin/oaks-init"),
            (&self.runc, "usr/bin/oaks-runc"),
            (&self.cni, "opt/cni/bin/azure-vnet"),
            (&self.cni_ipam, "opt/cni/bin/azure-vnet-ipam"),
        ]
    }
}

/// Directories of the tree that a machine sees read-only; all others are made fresh at each start.
pub const READ_ONLY_DIRS: &[&str] = &["usr", "opt", "lib", "lib64"];

/// Conflist of Oaks' own nodes: transparent mode, addresses from the wire server.
pub const CONFLIST: &str = r#"{
  "cniVersion": "1.1.0",
  "name": "azure",
  "plugins": [
    { "type": "azure-vnet", "mode": "transparent", "ipam": { "type": "azure-vnet-ipam" } }
  ]
}
"#;

/// Builds (or refreshes) the tree in `dir`. Files are hard links where the file system allows it, copies elsewhere, so a
/// rebuilt binary never changes under a running machine.
///
/// # Errors
/// Fails if a binary or one of its libraries cannot be read; the tree may then be incomplete and is made again next time.
pub fn build(dir: &Path, binaries: &Binaries) -> Result<(), TreeError> {
    for sub in READ_ONLY_DIRS.iter().chain(&["usr/bin", "usr/sbin", "opt/cni/bin"]) {
        let path = dir.join(sub);
        fs::create_dir_all(&path).map_err(|source| TreeError::Io {
            doing: "creating",
            path,
            source,
        })?;
    }
    let mut libraries = BTreeSet::new();
    for (from, to) in binaries.placed() {
        place(from, &dir.join(to))?;
        libraries.extend(shared_libraries(from));
    }
    for library in libraries {
        let to = dir.join(library.strip_prefix("/").unwrap_or(&library));
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(|source| TreeError::Io {
                doing: "creating",
                path: parent.into(),
                source,
            })?;
        }
        place(&library, &to)?;
    }
    Ok(())
}

fn place(from: &Path, to: &Path) -> Result<(), TreeError> {
    let same = match (fs::metadata(from), fs::metadata(to)) {
        (Ok(a), Ok(b)) => a.len() == b.len() && a.modified().ok() == b.modified().ok(),
        _ => false,
    };
    if same {
        return Ok(());
    }
    // A fresh inode under a temporary name, renamed over: running machines keep the one they have.
    let mut tmp: OsString = to.as_os_str().to_owned();
    tmp.push(".new");
    let tmp = PathBuf::from(tmp);
    let _ = fs::remove_file(&tmp);
    let real = fs::canonicalize(from).map_err(|source| TreeError::Io {
        doing: "resolving",
        path: from.into(),
        source,
    })?;
    if fs::hard_link(&real, &tmp).is_err() {
        fs::copy(&real, &tmp).map_err(|source| TreeError::Io {
            doing: "copying",
            path: real.clone(),
            source,
        })?;
        if let Ok(m) = fs::metadata(&real).and_then(|m| m.modified()) {
            let _ = fs::File::options()
                .write(true)
                .open(&tmp)
                .and_then(|f| f.set_modified(m));
        }
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o755)).map_err(|source| TreeError::Io {
            doing: "setting the mode of",
            path: tmp.clone(),
            source,
        })?;
    }
    fs::rename(&tmp, to).map_err(|source| TreeError::Io {
        doing: "placing",
        path: to.into(),
        source,
    })
}

/// Absolute paths of the interpreter and libraries that the dynamic loader would map for `binary`; empty for a static one.
fn shared_libraries(binary: &Path) -> Vec<PathBuf> {
    // The loader itself lists what it would map; this needs no ELF parser and follows its own search path.
    for loader in ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"] {
        if !Path::new(loader).exists() {
            continue;
        }
        let Ok(out) = Command::new(loader).arg("--list").arg(binary).output() else {
            continue;
        };
        if !out.status.success() {
            return vec![];
        }
        let mut found: Vec<PathBuf> = parse_loader_list(&String::from_utf8_lossy(&out.stdout));
        found.push(PathBuf::from(loader));
        return found;
    }
    vec![]
}

/// Parses `name => /path (0x..)` and `/path (0x..)` lines.
fn parse_loader_list(text: &str) -> Vec<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let line = line.trim();
            let path = line.split_once("=> ").map_or(line, |(_, p)| p);
            let path = path.split_once(" (").map_or(path, |(p, _)| p);
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_loaders_list() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x7f)\n\t/lib64/ld-linux-x86-64.so.2 (0x7f1)\n";
        let paths = parse_loader_list(text);
        assert_eq!(
            paths,
            [
                PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"),
                "/lib64/ld-linux-x86-64.so.2".into()
            ]
        );
    }

    #[test]
    fn names_the_missing_helper() {
        let err = Binaries::beside(Path::new("/nonexistent/oaks"), None)
            .unwrap_err()
            .to_string();
        assert!(err.contains("oaks-init") && err.contains("cargo build"), "{err}");
    }
}
