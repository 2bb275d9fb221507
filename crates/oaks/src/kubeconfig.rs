//! The user's own kubeconfig: entries of ours are merged in and taken out again, everything else stays as it was.
//!
//! The file is the first path of `KUBECONFIG`, else `~/.kube/config` of the invoking user (under sudo, of `SUDO_USER`).
//! It is replaced atomically, mode 0600, owned by that user.

use std::{
    fs, io,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum KubeconfigError {
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is not a kubeconfig: {reason}; move it away or fix it, nothing was changed")]
    Malformed { path: PathBuf, reason: String },
    #[error("{path} has a context named {name} that Oaks did not write; use --overwrite to replace it")]
    Foreign { path: PathBuf, name: String },
    #[error("no home folder is known for the invoking user; set KUBECONFIG")]
    NoHome,
    #[error("writing YAML: {reason}")]
    Encode { reason: String },
}

/// Where the user's entries go, and who owns the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub path: PathBuf,
    /// Owner to set when running under sudo.
    pub owner: Option<(u32, u32)>,
}

impl Target {
    /// From the environment; see the module.
    pub fn of_user(env: impl Fn(&str) -> Option<String>) -> Result<Self, KubeconfigError> {
        let owner = match (env("SUDO_UID"), env("SUDO_GID")) {
            (Some(u), Some(g)) => u.parse().ok().zip(g.parse().ok()),
            _ => None,
        };
        if let Some(list) = env("KUBECONFIG") {
            if let Some(first) = std::env::split_paths(&list).find(|p| !p.as_os_str().is_empty()) {
                return Ok(Self { path: first, owner });
            }
        }
        let home = match (owner, env("SUDO_USER")) {
            (Some(_), Some(user)) => home_of(&user),
            _ => None,
        };
        let home = home
            .or_else(|| env("HOME").map(PathBuf::from))
            .ok_or(KubeconfigError::NoHome)?;
        Ok(Self {
            path: home.join(".kube/config"),
            owner,
        })
    }
}

fn home_of(user: &str) -> Option<PathBuf> {
    let passwd = fs::read_to_string("/etc/passwd").ok()?;
    let line = passwd.lines().find(|l| l.split(':').next() == Some(user))?;
    line.split(':').nth(5).map(PathBuf::from)
}

/// Merges `entries` (a kubeconfig with one or more contexts) into the file and makes its current context current.
///
/// Entries of the same names are replaced if Oaks wrote them (they carry our extension) or `overwrite` is set.
///
/// # Errors
/// A file that is no kubeconfig, or a foreign context of that name: nothing is changed.
pub fn save(target: &Target, entries: &str, overwrite: bool) -> Result<(), KubeconfigError> {
    let mut file = read(&target.path)?;
    let ours: Value = parse(&target.path, entries)?;
    for list in ["clusters", "users", "contexts"] {
        for entry in ours[list].as_array().into_iter().flatten() {
            let mut entry = entry.clone();
            if list == "contexts" {
                mark(&mut entry);
            }
            put(&mut file, list, entry, overwrite, &target.path)?;
        }
    }
    file["current-context"] = ours["current-context"].clone();
    write(target, &file)
}

/// Takes the context `name` of ours out, with its cluster and user if no other context uses them. `false` if it was not there.
pub fn remove(target: &Target, name: &str) -> Result<bool, KubeconfigError> {
    let mut file = read(&target.path)?;
    let Some(context) = named(&file, "contexts", name).cloned() else {
        return Ok(false);
    };
    drop_named(&mut file, "contexts", name);
    for (list, field) in [("clusters", "cluster"), ("users", "user")] {
        let Some(used) = context["context"][field].as_str() else {
            continue;
        };
        let still = file["contexts"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|c| c["context"][field] == used);
        if !still {
            drop_named(&mut file, list, used);
        }
    }
    if file["current-context"] == name {
        file["current-context"] = json!("");
    }
    write(target, &file)?;
    Ok(true)
}

fn read(path: &Path) -> Result<Value, KubeconfigError> {
    let empty = || json!({"apiVersion": "v1", "kind": "Config", "clusters": [], "users": [], "contexts": [], "current-context": "", "preferences": {}});
    match fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(empty()),
        Ok(text) => parse(path, &text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(empty()),
        Err(source) => Err(KubeconfigError::Io {
            doing: "reading",
            path: path.into(),
            source,
        }),
    }
}

fn parse(path: &Path, text: &str) -> Result<Value, KubeconfigError> {
    let malformed = |reason: String| KubeconfigError::Malformed {
        path: path.into(),
        reason,
    };
    let mut value: Value = serde_saphyr::from_str(text).map_err(|e| malformed(e.to_string()))?;
    let Some(object) = value.as_object_mut() else {
        return Err(malformed("it is no mapping".to_owned()));
    };
    for list in ["clusters", "users", "contexts"] {
        let entry = object.entry(list).or_insert(Value::Null);
        if entry.is_null() {
            *entry = json!([]);
        }
        if !entry.is_array() {
            return Err(malformed(format!("{list} is no list")));
        }
    }
    Ok(value)
}

fn named<'a>(file: &'a Value, list: &str, name: &str) -> Option<&'a Value> {
    file[list].as_array()?.iter().find(|e| e["name"] == name)
}

fn drop_named(file: &mut Value, list: &str, name: &str) {
    if let Some(entries) = file[list].as_array_mut() {
        entries.retain(|e| e["name"] != name);
    }
}

const EXTENSION: &str = "oaks";

fn mark(context: &mut Value) {
    context["context"]["extensions"] = json!([{"name": EXTENSION, "extension": {"managed": true}}]);
}

fn is_ours(context: &Value) -> bool {
    context["context"]["extensions"]
        .as_array()
        .into_iter()
        .flatten()
        .any(|e| e["name"] == EXTENSION)
}

fn put(file: &mut Value, list: &str, entry: Value, overwrite: bool, path: &Path) -> Result<(), KubeconfigError> {
    let name = entry["name"].as_str().unwrap_or_default().to_owned();
    if let Some(old) = named(file, list, &name) {
        let foreign = list == "contexts" && !is_ours(old);
        if foreign && !overwrite {
            return Err(KubeconfigError::Foreign {
                path: path.into(),
                name,
            });
        }
    }
    drop_named(file, list, &name);
    if let Some(entries) = file[list].as_array_mut() {
        entries.push(entry);
    }
    Ok(())
}

fn write(target: &Target, file: &Value) -> Result<(), KubeconfigError> {
    let io_err = |doing: &'static str, path: &Path| {
        let path = path.to_path_buf();
        move |source| KubeconfigError::Io { doing, path, source }
    };
    let text = serde_saphyr::to_string(file).map_err(|e| KubeconfigError::Encode { reason: e.to_string() })?;
    // A symbolic link stays one: the file it names is replaced.
    let path = fs::canonicalize(&target.path).unwrap_or_else(|_| target.path.clone());
    let dir = path.parent().unwrap_or(Path::new("."));
    let fresh_dir = !dir.exists();
    fs::create_dir_all(dir).map_err(io_err("creating", dir))?;
    if let (true, Some((uid, gid))) = (fresh_dir, target.owner) {
        std::os::unix::fs::chown(dir, Some(uid), Some(gid)).map_err(io_err("giving away", dir))?;
    }
    let tmp = path.with_extension(format!("oaks-{}", std::process::id()));
    let result = (|| {
        let mut f = fs::File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&tmp)
            .map_err(io_err("creating", &tmp))?;
        fs::set_permissions(&tmp, fs::Permissions::from_mode(0o600)).map_err(io_err("setting the mode of", &tmp))?;
        io::Write::write_all(&mut f, text.as_bytes()).map_err(io_err("writing", &tmp))?;
        f.sync_all().map_err(io_err("writing", &tmp))?;
        if let Some((uid, gid)) = target.owner {
            std::os::unix::fs::chown(&tmp, Some(uid), Some(gid)).map_err(io_err("giving away", &tmp))?;
        }
        fs::rename(&tmp, &path).map_err(io_err("replacing", &path))
    })();
    if result.is_err() {
        let _ = fs::remove_file(&tmp);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = "apiVersion: v1\nkind: Config\ncurrent-context: demo\nclusters: [{name: demo, cluster: {server: 'https://198.19.0.4'}}]\n\
        users: [{name: clusterUser_rg_demo, user: {client-certificate-data: YQ==}}]\n\
        contexts: [{name: demo, context: {cluster: demo, user: clusterUser_rg_demo}}]\n";

    fn target() -> (tempfile::TempDir, Target) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/config");
        (dir, Target { path, owner: None })
    }

    #[test]
    fn saves_beside_what_is_there_and_removes_only_ours() {
        let (_dir, t) = target();
        fs::create_dir_all(t.path.parent().unwrap()).unwrap();
        fs::write(&t.path, "apiVersion: v1\nkind: Config\ncurrent-context: x\nclusters:\n- name: x\n  cluster: {server: 'https://x', odd: [1]}\ncontexts:\n- name: x\n  context: {cluster: x, user: x}\nusers: null\n").unwrap();
        save(&t, OURS, false).unwrap();
        save(&t, OURS, false).unwrap();
        let v = read(&t.path).unwrap();
        assert_eq!(v["current-context"], "demo");
        assert_eq!(v["contexts"].as_array().unwrap().len(), 2);
        assert_eq!(named(&v, "clusters", "x").unwrap()["cluster"]["odd"][0], 1);
        assert_eq!(fs::metadata(&t.path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(remove(&t, "demo").unwrap());
        assert!(!remove(&t, "demo").unwrap());
        let v = read(&t.path).unwrap();
        assert_eq!(v["clusters"].as_array().unwrap().len(), 1);
        assert_eq!(v["users"].as_array().unwrap().len(), 0);
        assert_eq!(v["current-context"], "");
    }

    #[test]
    fn refuses_foreign_contexts_and_broken_files_without_touching_them() {
        let (_dir, t) = target();
        fs::create_dir_all(t.path.parent().unwrap()).unwrap();
        let foreign = "contexts:\n- name: demo\n  context: {cluster: a, user: b}\n";
        fs::write(&t.path, foreign).unwrap();
        assert!(matches!(save(&t, OURS, false), Err(KubeconfigError::Foreign { .. })));
        assert_eq!(fs::read_to_string(&t.path).unwrap(), foreign);
        save(&t, OURS, true).unwrap();
        fs::write(&t.path, "- just\n- a list\n").unwrap();
        assert!(matches!(save(&t, OURS, true), Err(KubeconfigError::Malformed { .. })));
        assert_eq!(fs::read_to_string(&t.path).unwrap(), "- just\n- a list\n");
    }

    #[test]
    fn finds_the_users_file() {
        let env = |pairs: &'static [(&str, &str)]| {
            move |k: &str| pairs.iter().find(|(n, _)| *n == k).map(|(_, v)| (*v).to_owned())
        };
        let t = Target::of_user(env(&[("KUBECONFIG", ":/a/b:/c"), ("HOME", "/h")])).unwrap();
        assert_eq!(t.path, PathBuf::from("/a/b"));
        let t = Target::of_user(env(&[("HOME", "/h")])).unwrap();
        assert_eq!(t.path, PathBuf::from("/h/.kube/config"));
        assert!(matches!(Target::of_user(env(&[])), Err(KubeconfigError::NoHome)));
    }
}
