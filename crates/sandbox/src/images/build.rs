//! Making an image: directories and tars become the layers of an OCI archive. The same input gives the same bytes.

use std::{
    collections::HashMap,
    fs::{File, Metadata},
    io::{self, Read, Seek, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
};

use serde_json::json;
use tar::{Builder, EntryType, Header};

use super::{ImageConfig, ImageError, Name, architecture, digest_of, finish_digest, io_error};

/// Where a layer's files come from.
#[derive(Clone, Debug)]
pub enum LayerSource {
    /// A directory whose content becomes `/`, with owners, modes, links and file capabilities as found.
    Directory(PathBuf),
    /// An uncompressed tar, taken as it is.
    Tar(PathBuf),
    /// Single files, owned by root: absolute path, content, mode.
    Files(Vec<(PathBuf, Vec<u8>, u32)>),
}

#[derive(Clone, Debug)]
pub struct BuildSpec {
    /// `nginx`, `team/app:1`
    pub reference: String,
    /// Lowest first.
    pub layers: Vec<LayerSource>,
    pub config: ImageConfig,
}

/// Writes an OCI archive (layers uncompressed: they are read once, locally).
///
/// # Errors
/// `Invalid` without layers; `Io` names the file that could not be read.
pub fn build_archive(spec: &BuildSpec, out: &Path) -> Result<(), ImageError> {
    let name = match Name::parse(&spec.reference)? {
        Name::Tagged(name) => name,
        _ => return Err(invalid("an image is built under a name with a tag, not a digest")),
    };
    if spec.layers.is_empty() {
        return Err(invalid("it has no layers"));
    }
    let file = File::create(out).map_err(io_error("create", out))?;
    let mut archive = Builder::new(io::BufWriter::new(file));
    let write = |error| io_error("write", out)(error);

    let mut descriptors = Vec::new();
    let mut diff_ids = Vec::new();
    let scratch = out.with_extension("layer");
    for layer in &spec.layers {
        let result = add_layer(layer, &scratch, &mut archive, out);
        let _ = std::fs::remove_file(&scratch);
        let (digest, size) = result?;
        descriptors
            .push(json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size }));
        diff_ids.push(digest);
    }
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": spec.config,
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = serde_json::to_vec(&config).unwrap_or_default();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest_of(&config), "size": config.len() },
        "layers": descriptors,
    });
    let manifest = serde_json::to_vec(&manifest).unwrap_or_default();
    let tag = name.rsplit(':').next().unwrap_or("latest");
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest_of(&manifest),
            "size": manifest.len(),
            "annotations": { "io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag },
        }],
    });
    let index = serde_json::to_vec(&index).unwrap_or_default();
    for document in [&config, &manifest] {
        append(&mut archive, &blob_path(&digest_of(document)), document).map_err(write)?;
    }
    append(&mut archive, "index.json", &index).map_err(write)?;
    append(&mut archive, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#).map_err(write)?;
    archive.into_inner().and_then(|mut file| file.flush()).map_err(write)
}

fn invalid(reason: &str) -> ImageError {
    ImageError::Invalid {
        what: "image to build".to_owned(),
        reason: reason.to_owned(),
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

fn append(archive: &mut Builder<impl Write>, path: &str, bytes: &[u8]) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    archive.append_data(&mut header, path, bytes)
}

/// Appends one layer's tar as a blob; its digest and size.
fn add_layer(
    layer: &LayerSource,
    scratch: &Path,
    archive: &mut Builder<impl Write>,
    out: &Path,
) -> Result<(String, u64), ImageError> {
    let path = match layer {
        LayerSource::Tar(path) => path.as_path(),
        LayerSource::Directory(dir) => {
            write_directory(dir, scratch)?;
            scratch
        }
        LayerSource::Files(files) => {
            write_files(files, scratch).map_err(io_error("write", scratch))?;
            scratch
        }
    };
    let read = |error| io_error("read", path)(error);
    let mut file = File::open(path).map_err(read)?;
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    let (mut size, mut buffer) = (0, vec![0; 128 << 10]);
    loop {
        let len = file.read(&mut buffer).map_err(read)?;
        if len == 0 {
            break;
        }
        if size == 0 && buffer.starts_with(&[0x1f, 0x8b]) {
            return Err(ImageError::Unsupported {
                feature: "a compressed tar as layer of a built image".to_owned(),
            });
        }
        context.update(&buffer[..len]);
        size += len as u64;
    }
    let digest = finish_digest(context.finish().as_ref());
    file.rewind().map_err(read)?;
    let mut header = Header::new_gnu();
    header.set_size(size);
    header.set_mode(0o644);
    archive
        .append_data(&mut header, blob_path(&digest), file)
        .map_err(io_error("write", out))?;
    Ok((digest, size))
}

fn write_files(files: &[(PathBuf, Vec<u8>, u32)], target: &Path) -> io::Result<()> {
    let mut tar = Builder::new(io::BufWriter::new(File::create(target)?));
    for (path, content, mode) in files {
        let mut header = Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        tar.append_data(&mut header, path.strip_prefix("/").unwrap_or(path), content.as_slice())?;
    }
    tar.into_inner()?.flush()
}

fn write_directory(dir: &Path, target: &Path) -> Result<(), ImageError> {
    let file = File::create(target).map_err(io_error("create", target))?;
    let mut walk = Walk {
        tar: Builder::new(io::BufWriter::new(file)),
        links: HashMap::new(),
    };
    let metadata = dir.symlink_metadata().map_err(io_error("read", dir))?;
    if !metadata.is_dir() {
        return Err(invalid("a layer's directory is not a directory"));
    }
    walk.descend(dir, Path::new("")).and_then(|()| {
        walk.tar
            .into_inner()
            .and_then(|mut file| file.flush())
            .map_err(io_error("write", target))
    })
}

struct Walk<W: Write> {
    tar: Builder<W>,
    /// First name of every file with several, by device and inode.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Walk<W> {
    fn descend(&mut self, dir: &Path, inside: &Path) -> Result<(), ImageError> {
        let entries = std::fs::read_dir(dir).map_err(io_error("list", dir))?;
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>();
        let names = names
            .as_mut()
            .map_err(|error| io_error("list", dir)(io::Error::from(error.kind())))?;
        names.sort();
        for name in names.iter() {
            let (path, inside) = (dir.join(name), inside.join(name));
            let metadata = path.symlink_metadata().map_err(io_error("read", &path))?;
            self.add(&path, &inside, &metadata).map_err(io_error("read", &path))?;
            if metadata.is_dir() {
                self.descend(&path, &inside)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, inside: &Path, metadata: &Metadata) -> io::Result<()> {
        let kind = metadata.file_type();
        let mut header = Header::new_gnu();
        header.set_uid(metadata.uid().into());
        header.set_gid(metadata.gid().into());
        header.set_mode(metadata.mode() & 0o7777);
        header.set_mtime(metadata.mtime().max(0) as u64);
        header.set_size(0);
        if kind.is_dir() {
            header.set_entry_type(EntryType::Directory);
            return self.tar.append_data(&mut header, inside, io::empty());
        }
        if kind.is_symlink() {
            header.set_entry_type(EntryType::Symlink);
            return self.tar.append_link(&mut header, inside, std::fs::read_link(path)?);
        }
        if kind.is_fifo() || kind.is_char_device() || kind.is_block_device() {
            header.set_entry_type(if kind.is_fifo() {
                EntryType::Fifo
            } else if kind.is_char_device() {
                EntryType::Char
            } else {
                EntryType::Block
            });
            header.set_device_major(rustix::fs::major(metadata.rdev()))?;
            header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
            return self.tar.append_data(&mut header, inside, io::empty());
        }
        if !kind.is_file() {
            // A socket means nothing in an image.
            return Ok(());
        }
        if metadata.nlink() > 1 {
            if let Some(first) = self.links.get(&(metadata.dev(), metadata.ino())) {
                header.set_entry_type(EntryType::Link);
                return self.tar.append_link(&mut header, inside, first);
            }
            self.links.insert((metadata.dev(), metadata.ino()), inside.to_owned());
        }
        let file = File::open(path)?;
        let mut value = [0; 64];
        if let Ok(len) = rustix::fs::fgetxattr(&file, "security.capability", &mut value) {
            self.tar
                .append_pax_extensions([("SCHILY.xattr.security.capability", &value[..len])])?;
        }
        header.set_entry_type(EntryType::Regular);
        header.set_size(metadata.len());
        self.tar.append_data(&mut header, inside, file.take(metadata.len()))
    }
}
