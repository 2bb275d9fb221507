//! A layer's tar into a directory that overlay can use as a lower layer.
//!
//! Every path is resolved by the kernel inside the target (`openat2` with `RESOLVE_IN_ROOT`), so neither `..` nor a symlink
//! of the layer leads out of it. Whiteouts become overlay's: a 0/0 character device, or an opaque mark on the directory.

use std::{
    ffi::OsStr,
    io::{self, BufReader, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use flate2::read::MultiGzDecoder;
use rustix::{
    fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags},
    io::Errno,
};
use tar::{Archive, Entry, EntryType};

use super::{ImageError, finish_digest, io_error};

/// Bounds of one layer.
#[derive(Clone, Copy, Debug)]
pub struct UnpackLimits {
    pub bytes_max: u64,
    pub entries_max: u64,
}

impl Default for UnpackLimits {
    /// 32 GiB and two million files: larger than any image seen in practice, small against a disk.
    fn default() -> Self {
        Self {
            bytes_max: 32 << 30,
            entries_max: 2_000_000,
        }
    }
}

/// Extended attributes a layer may set: file capabilities and users' own. `trusted.*` would let it fake overlay marks.
const XATTR_PREFIX: &str = "SCHILY.xattr.";
const XATTRS: [&str; 2] = ["security.capability", "user."];

/// Unpacks into `target`; returns the sum of file sizes and the digest of the uncompressed tar.
pub(super) fn unpack(tar: impl Read, target: &Path, limits: &UnpackLimits) -> Result<(u64, String), ImageError> {
    let mut reader = BufReader::with_capacity(128 << 10, tar);
    let start = io::BufRead::fill_buf(&mut reader).map_err(ImageError::Layer)?;
    let plain: Box<dyn Read + '_> = match start {
        [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(128 << 10, MultiGzDecoder::new(reader))),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            return Err(ImageError::Unsupported {
                feature: "a zstd-compressed layer".to_owned(),
            });
        }
        _ => Box::new(reader),
    };
    let mut hashed = Hashed {
        inner: plain,
        context: ring::digest::Context::new(&ring::digest::SHA256),
        // Headers and padding: at most some kilobytes per entry.
        left: limits.bytes_max.saturating_add(limits.entries_max.saturating_mul(4096)),
    };
    let root = rustix::fs::open(
        target,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| io_error("open", target)(error.into()))?;
    let mut layer = Layer {
        root,
        bytes: 0,
        entries: 0,
        limits,
        parent: None,
    };
    let mut archive = Archive::new(&mut hashed);
    for entry in archive.entries().map_err(ImageError::Layer)? {
        layer.add(&mut entry.map_err(ImageError::Layer)?)?;
    }
    let bytes = layer.bytes;
    // Padding after the last entry belongs to the digest.
    io::copy(&mut hashed, &mut io::sink()).map_err(ImageError::Layer)?;
    Ok((bytes, finish_digest(hashed.context.finish().as_ref())))
}

struct Hashed<R> {
    inner: R,
    context: ring::digest::Context,
    left: u64,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.inner.read(buffer)?;
        self.left = self
            .left
            .checked_sub(len as u64)
            .ok_or_else(|| io::Error::other("the layer exceeds the size limit"))?;
        self.context.update(&buffer[..len]);
        Ok(len)
    }
}

struct Layer<'a> {
    root: OwnedFd,
    bytes: u64,
    entries: u64,
    limits: &'a UnpackLimits,
    /// The directory of the last entry: most entries follow one of the same directory.
    parent: Option<(PathBuf, OwnedFd)>,
}

impl Layer<'_> {
    fn add(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<(), ImageError> {
        let kind = entry.header().entry_type();
        if matches!(
            kind,
            EntryType::XGlobalHeader | EntryType::XHeader | EntryType::GNULongName | EntryType::GNULongLink
        ) {
            return Ok(());
        }
        let raw = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&raw).into_owned();
        let refused = |reason| ImageError::Entry {
            entry: shown.clone(),
            reason,
        };
        self.entries += 1;
        if self.entries > self.limits.entries_max {
            return Err(ImageError::TooLarge {
                reason: format!("more than {} files", self.limits.entries_max),
            });
        }
        let path = plain_path(&raw).ok_or_else(|| refused("it leads out of the layer"))?;
        let failed = |error: Errno| ImageError::Io {
            doing: "unpack",
            path: path.clone(),
            source: error.into(),
        };
        let Some(name) = path.file_name() else {
            // The root itself: its owner and mode count.
            let root = self.root.try_clone().map_err(io_error("unpack", &path))?;
            return self
                .set_owner_and_mode(entry, root.as_fd(), OsStr::new("."))
                .map_err(failed);
        };
        let parent = self.parent(path.parent().unwrap_or(Path::new(""))).map_err(failed)?;

        if let Some(hidden) = name.as_bytes().strip_prefix(b".wh.") {
            return whiteout(parent.as_fd(), hidden).map_err(failed);
        }
        self.make_room(parent.as_fd(), name, kind).map_err(failed)?;
        match kind {
            EntryType::Directory => match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failed(error)),
            },
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let size = entry.size();
                self.bytes = self.bytes.saturating_add(size);
                if self.bytes > self.limits.bytes_max {
                    return Err(ImageError::TooLarge {
                        reason: format!("more than {} bytes", self.limits.bytes_max),
                    });
                }
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).map_err(failed)?;
                io::copy(entry, &mut std::fs::File::from(file)).map_err(io_error("unpack", &path))?;
            }
            EntryType::Symlink => {
                let link = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused("a symlink to nowhere"))?
                    .into_owned();
                rustix::fs::symlinkat(OsStr::from_bytes(&link), &parent, name).map_err(failed)?;
            }
            EntryType::Link => {
                let link = entry
                    .link_name_bytes()
                    .ok_or_else(|| refused("a hard link to nowhere"))?
                    .into_owned();
                let link = plain_path(&link).ok_or_else(|| refused("a hard link that leads out of the layer"))?;
                let of = link
                    .file_name()
                    .ok_or_else(|| refused("a hard link to the root"))?
                    .to_owned();
                let from = self.open_dir(link.parent().unwrap_or(Path::new("")));
                return match from.and_then(|from| rustix::fs::linkat(&from, &of, &parent, name, AtFlags::empty())) {
                    Err(Errno::NOENT) => Err(refused("a hard link to a file of another layer")),
                    other => other.map_err(failed),
                };
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                let (sort, device) = match kind {
                    EntryType::Fifo => (FileType::Fifo, 0),
                    _ => {
                        let number = |part: io::Result<Option<u32>>| part.ok().flatten().unwrap_or(0);
                        let device = rustix::fs::makedev(
                            number(entry.header().device_major()),
                            number(entry.header().device_minor()),
                        );
                        if kind == EntryType::Block {
                            (FileType::BlockDevice, device)
                        } else {
                            (FileType::CharacterDevice, device)
                        }
                    }
                };
                if sort == FileType::CharacterDevice && device == 0 {
                    return Err(refused("a device that overlay takes for a whiteout"));
                }
                rustix::fs::mknodat(&parent, name, sort, Mode::from_raw_mode(0o600), device).map_err(failed)?;
            }
            _ => return Err(refused("its type is unknown")),
        }
        if kind.is_file() || kind.is_dir() {
            self.set_xattrs(entry, parent.as_fd(), name)
                .map_err(io_error("unpack", &path))?;
        }
        self.set_owner_and_mode(entry, parent.as_fd(), name).map_err(failed)
    }

    /// A later entry of the same name replaces the earlier one; a directory stays a directory.
    fn make_room(&self, parent: impl AsFd, name: &OsStr, kind: EntryType) -> rustix::io::Result<()> {
        let found = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            other => other?,
        };
        match (FileType::from_raw_mode(found.st_mode), kind) {
            (FileType::Directory, EntryType::Directory) => Ok(()),
            (FileType::Directory, _) => rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR),
            _ => rustix::fs::unlinkat(&parent, name, AtFlags::empty()),
        }
    }

    fn set_owner_and_mode(
        &self,
        entry: &Entry<'_, impl Read>,
        parent: impl AsFd,
        name: &OsStr,
    ) -> rustix::io::Result<()> {
        let header = entry.header();
        let id = |value: io::Result<u64>| value.ok().and_then(|value| u32::try_from(value).ok()).unwrap_or(0);
        let (uid, gid) = (Uid::from_raw(id(header.uid())), Gid::from_raw(id(header.gid())));
        rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        if !header.entry_type().is_symlink() {
            // After the owner, because changing that clears the set-user-id bit. The name cannot be a symlink here.
            let mode = Mode::from_raw_mode(header.mode().unwrap_or(0o644) & 0o7777);
            rustix::fs::chmodat(&parent, name, mode, AtFlags::empty())?;
        }
        let time = Timespec {
            tv_sec: header.mtime().unwrap_or(0).min(i64::MAX as u64) as i64,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(&parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
    }

    fn set_xattrs(&self, entry: &mut Entry<'_, impl Read>, parent: impl AsFd, name: &OsStr) -> io::Result<()> {
        let Some(extensions) = entry.pax_extensions()? else {
            return Ok(());
        };
        for extension in extensions.flatten() {
            let Some(key) = extension.key().ok().and_then(|key| key.strip_prefix(XATTR_PREFIX)) else {
                continue;
            };
            if XATTRS.iter().any(|allowed| key.starts_with(allowed)) {
                let file = rustix::fs::openat(
                    &parent,
                    name,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                match rustix::fs::fsetxattr(&file, key, extension.value_bytes(), XattrFlags::empty()) {
                    // Not every file system has user attributes; capabilities matter more.
                    Err(Errno::OPNOTSUPP) if key.starts_with("user.") => {}
                    other => other?,
                }
            }
        }
        Ok(())
    }

    /// Opens a directory of the layer, making what is missing.
    fn parent(&mut self, path: &Path) -> rustix::io::Result<OwnedFd> {
        if let Some((last, fd)) = &self.parent
            && last == path
        {
            return rustix::io::fcntl_dupfd_cloexec(fd, 3);
        }
        let fd = match self.open_dir(path) {
            Err(Errno::NOENT) => {
                let mut partial = PathBuf::new();
                for part in path.components() {
                    let above = self.open_dir(&partial)?;
                    match rustix::fs::mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error),
                    }
                    partial.push(part);
                }
                self.open_dir(path)?
            }
            other => other?,
        };
        let copy = rustix::io::fcntl_dupfd_cloexec(&fd, 3)?;
        self.parent = Some((path.to_owned(), fd));
        Ok(copy)
    }

    fn open_dir(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        rustix::fs::openat2(
            &self.root,
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )
    }
}

/// `.wh..wh..opq` hides everything below its directory, `.wh.NAME` hides NAME; other `.wh..wh.` names are bookkeeping of aufs.
fn whiteout(parent: impl AsFd, hidden: &[u8]) -> rustix::io::Result<()> {
    if hidden == b".wh..opq" {
        // Attributes need a readable descriptor, the parent is a path descriptor.
        let dir = rustix::fs::openat(
            &parent,
            ".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        return rustix::fs::fsetxattr(&dir, "trusted.overlay.opaque", b"y", XattrFlags::empty());
    }
    if hidden.is_empty() || hidden.starts_with(b".wh.") {
        return Ok(());
    }
    match rustix::fs::mknodat(
        &parent,
        OsStr::from_bytes(hidden),
        FileType::CharacterDevice,
        Mode::empty(),
        0,
    ) {
        // The layer itself has the name: the whiteout meant the layers below.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error),
    }
}

/// A relative path of plain names; leading `/` and `.` parts are dropped. `None` if it goes upwards or is too long.
fn plain_path(raw: &[u8]) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(raw)).components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    (plain.as_os_str().len() < 4096 && !raw.contains(&0)).then_some(plain)
}
