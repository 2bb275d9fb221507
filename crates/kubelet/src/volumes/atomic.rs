//! A directory whose whole content changes at one instant: files live in a folder of their own, `..data` points to it,
//! and each top-level name is a symlink through `..data`. Readers see the old or the new content, never a mixture.
//!
//! # Source
//! The layout is upstream's (`pkg/volume/util/atomic_writer.go`, 1.36): applications watch `..data`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Component, Path},
};

use rustix::fs::{Gid, chown};

/// Relative path -> content and mode.
pub type Payload = BTreeMap<String, File>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    pub data: Vec<u8>,
    pub mode: u32,
}

/// Makes `dir` show exactly `payload`. Returns whether anything changed. `group` owns the files if given, and may read.
///
/// # Errors
/// `InvalidInput` for a path that leaves the directory; else what the file system says. The old content stays then.
pub fn write(dir: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    for path in payload.keys() {
        check(path)?;
    }
    fs::create_dir_all(dir)?;
    let current = dir.join("..data");
    if let Ok(old) = fs::read_link(&current)
        && same(&dir.join(old), payload)?
    {
        return Ok(false);
    }
    let stamp = (0u32..)
        .map(|n| format!("..{}_{n}", std::process::id()))
        .find(|name| !dir.join(name).exists())
        .ok_or_else(|| io::Error::other("no free name"))?;
    let fresh = dir.join(&stamp);
    fs::create_dir(&fresh)?;
    let written = fill(&fresh, payload, group).and_then(|()| {
        let tmp = dir.join("..data_tmp");
        let _ = fs::remove_file(&tmp);
        symlink(&stamp, &tmp)?;
        fs::rename(&tmp, &current)
    });
    if let Err(e) = written {
        let _ = fs::remove_dir_all(&fresh);
        return Err(e);
    }
    let tops: BTreeSet<&str> = payload.keys().filter_map(|p| p.split('/').next()).collect();
    for top in &tops {
        let link = dir.join(top);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(top), &link)?;
        }
    }
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        if name == "..data" || name == stamp || tops.contains(name) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(true)
}

fn check(path: &str) -> io::Result<()> {
    let fine = !path.is_empty()
        && !path.starts_with("..")
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)));
    if fine {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("path {path:?} leaves the volume"),
        ))
    }
}

fn fill(dir: &Path, payload: &Payload, group: Option<u32>) -> io::Result<()> {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    for (path, file) in payload {
        let target = dir.join(path);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&target, &file.data)?;
        let mut mode = file.mode & 0o7777;
        if let Some(gid) = group {
            chown(&target, None, Some(Gid::from_raw(gid)))?;
            mode |= 0o440;
        }
        fs::set_permissions(&target, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

fn same(dir: &Path, payload: &Payload) -> io::Result<bool> {
    for (path, file) in payload {
        match fs::read(dir.join(path)) {
            Ok(data) if data == file.data => {}
            Ok(_) => return Ok(false),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
                ) =>
            {
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
    }
    match count(dir) {
        Ok(n) => Ok(n == payload.len()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

fn count(dir: &Path) -> io::Result<usize> {
    let mut n = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        n += if entry.file_type()?.is_dir() {
            count(&entry.path())?
        } else {
            1
        };
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(entries: &[(&str, &str)]) -> Payload {
        entries
            .iter()
            .map(|(p, d)| {
                (
                    (*p).to_owned(),
                    File {
                        data: d.as_bytes().to_vec(),
                        mode: 0o644,
                    },
                )
            })
            .collect()
    }

    #[test]
    fn swaps_the_whole_content() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = tmp.path().join("v");
        assert!(write(&dir, &payload(&[("a", "1"), ("deep/b", "2")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "1");
        assert_eq!(fs::read_to_string(dir.join("deep/b")).unwrap(), "2");
        let before = fs::read_link(dir.join("..data")).unwrap();
        assert!(!write(&dir, &payload(&[("a", "1"), ("deep/b", "2")]), None).unwrap());
        assert_eq!(fs::read_link(dir.join("..data")).unwrap(), before);
        assert!(write(&dir, &payload(&[("a", "3")]), None).unwrap());
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "3");
        assert!(!dir.join("deep").exists());
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left.len(), 3, "{left:?}");
    }

    #[test]
    fn keeps_to_its_directory() {
        let tmp = tempfile::tempdir().unwrap();
        for bad in ["../x", "/x", "a/../../x", "", "..data"] {
            assert_eq!(
                write(tmp.path(), &payload(&[(bad, "1")]), None).unwrap_err().kind(),
                io::ErrorKind::InvalidInput
            );
        }
    }
}
