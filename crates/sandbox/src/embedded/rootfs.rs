//! Looking into a container's root file system, which its image and its processes control: every path is resolved by the
//! kernel inside it.

use std::{
    io::{self, Read},
    os::fd::OwnedFd,
    path::{Component, Path},
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

/// `/etc/passwd` and `/etc/group`; larger ones are cut, which can only hide users.
const FILE_BYTES_MAX: u64 = 4 << 20;

fn open(root: &Path, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(&root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// A small text file; empty if there is none.
pub fn read(root: &Path, path: &str) -> io::Result<String> {
    // NONBLOCK: it might be a fifo.
    let file = match open(root, Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK) {
        Ok(file) => std::fs::File::from(file),
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    if !file.metadata()?.is_file() {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes a directory and its parents, owned by root, as `WORKDIR` does. Whatever exists is left as it is.
pub fn make_dir(root: &Path, path: &Path) -> io::Result<()> {
    let mut partial = std::path::PathBuf::from(".");
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        let parent = open(root, &partial, OFlags::PATH | OFlags::DIRECTORY)?;
        match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        partial.push(name);
    }
    Ok(())
}
