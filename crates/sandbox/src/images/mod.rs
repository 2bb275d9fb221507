//! Container images on disk: one store per host, every layer unpacked once and shared read-only by all containers.
//!
//! * `reference`: names. * `unpack`: a layer's tar into a directory that overlay understands. * `archive`: reading OCI and
//!   docker archives. * `build`: making an archive from directories. * `pull`: fetching from a registry.
//!
//! On disk: `layers/<diff id>/fs` unpacked layers, `images/<id>.json` one record per image, `refs.json` names to ids, `lock`
//! held while anything changes, `tmp` unfinished work, emptied at the next start of a writer. Files appear by rename, so a
//! reader (a machine that sees the directory read-only) needs no lock.

mod archive;
mod build;
mod pull;
pub mod reference;
mod unpack;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use build::{BuildSpec, LayerSource, build_archive};
pub use reference::{Name, ReferenceError};
pub use unpack::UnpackLimits;

#[derive(Debug, Error)]
pub enum ImageError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error("{doing} {path}")]
    Io {
        doing: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{what} is not valid: {reason}")]
    Invalid { what: String, reason: String },
    /// A layer that could harm the host or that overlay cannot hold.
    #[error("layer entry {entry:?} is refused: {reason}")]
    Entry { entry: String, reason: &'static str },
    #[error("read the layer")]
    Layer(#[source] io::Error),
    #[error("{what} has digest {found}, expected {wanted}")]
    Digest {
        what: String,
        found: String,
        wanted: String,
    },
    #[error("the image is larger than the limit: {reason}")]
    TooLarge { reason: String },
    #[error("image {reference} is not in the store")]
    NotFound { reference: String },
    #[error("image {reference} has no {wanted} variant")]
    Platform { reference: String, wanted: String },
    #[error("fetch {what} of {reference}: {reason}")]
    Registry {
        reference: String,
        what: String,
        reason: String,
    },
    #[error("{feature} is not supported")]
    Unsupported { feature: String },
    #[error("the image store at {path} is read-only here")]
    ReadOnly { path: PathBuf },
}

pub(crate) fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    let path = path.to_owned();
    move |source| ImageError::Io { doing, path, source }
}

/// What an image asks for at run time (the `config` object of an OCI image configuration; unknown fields are dropped).
#[derive(Clone, Debug, Default, Deserialize, Serialize, PartialEq)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    #[serde(deserialize_with = "null_as_default")]
    pub user: String,
    #[serde(deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub cmd: Vec<String>,
    #[serde(deserialize_with = "null_as_default")]
    pub working_dir: String,
    #[serde(deserialize_with = "null_as_default")]
    pub stop_signal: String,
    #[serde(deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_as_default")]
    pub exposed_ports: BTreeMap<String, serde_json::Value>,
}

fn null_as_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

/// One image of a store.
#[derive(Clone, Debug, PartialEq)]
pub struct Image {
    /// `sha256:...` of its configuration.
    pub id: String,
    /// Names with tags, sorted: `docker.io/library/nginx:latest`.
    pub tags: Vec<String>,
    /// Names with manifest digests, sorted.
    pub digests: Vec<String>,
    pub config: ImageConfig,
    /// Directories of its layers, uppermost first, as overlay wants them.
    pub layers: Vec<PathBuf>,
    pub size_bytes: u64,
}

/// The file `images/<hex>.json`.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct Record {
    id: String,
    /// Lowest first.
    diff_ids: Vec<String>,
    config: ImageConfig,
    size_bytes: u64,
    /// `sha256:...` of the manifests it came by.
    manifests: BTreeSet<String>,
}

/// A store directory. Cheap to clone; several processes may use one directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    writable: bool,
    limits: UnpackLimits,
}

impl Store {
    /// Opens for reading and writing; the directory is made if needed.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, ImageError> {
        let store = Self {
            dir: dir.into(),
            writable: true,
            limits: UnpackLimits::default(),
        };
        for name in ["layers", "images", "tmp"] {
            let path = store.dir.join(name);
            std::fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        }
        // Whatever lies in tmp and is locked by nobody was left by a crash.
        if let Some(_lock) = store.try_lock()? {
            let tmp = store.dir.join("tmp");
            std::fs::remove_dir_all(&tmp).map_err(io_error("empty", &tmp))?;
            std::fs::create_dir(&tmp).map_err(io_error("create", &tmp))?;
        }
        Ok(store)
    }

    /// Opens for reading; the directory may be empty or missing, and may fill later.
    pub fn open_read_only(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            writable: false,
            limits: UnpackLimits::default(),
        }
    }

    pub fn with_limits(self, limits: UnpackLimits) -> Self {
        Self { limits, ..self }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The image a name (`nginx`, `nginx:1.27`, `repo@sha256:...`) or an id (`sha256:...`) stands for.
    pub fn resolve(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let refs = self.refs()?;
        let id = match Name::parse(reference)? {
            Name::Id(id) => Some(id),
            Name::Tagged(name) | Name::Digested { name, .. } => refs.get(&name).cloned(),
        };
        let Some(id) = id else { return Ok(None) };
        Ok(self.record(&id)?.map(|record| self.image(record, &refs)))
    }

    /// All images, by id.
    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let refs = self.refs()?;
        Ok(self
            .records()?
            .into_iter()
            .map(|record| self.image(record, &refs))
            .collect())
    }

    /// Adds the images of an OCI or docker archive (plain or gzip). `name` overrides the names inside; it is needed if there
    /// are none. Layers that are present are not unpacked again.
    pub fn import(&self, archive: &Path, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
        let _lock = self.lock()?;
        archive::import(self, archive, name)
    }

    /// Makes an image from directories or tars and adds it under its name.
    pub fn build(&self, spec: &BuildSpec) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let work = self.work_dir()?;
        let archive = work.path().join("image.tar");
        build_archive(spec, &archive)?;
        let mut images = archive::import(self, &archive, None)?;
        images.pop().ok_or_else(|| ImageError::NotFound {
            reference: spec.reference.clone(),
        })
    }

    /// Gives an image another name.
    pub fn tag(&self, reference: &str, name: &str) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let image = self.resolve(reference)?.ok_or_else(|| ImageError::NotFound {
            reference: reference.to_owned(),
        })?;
        self.set_refs([(Name::parse(name)?.key(), image.id)])
    }

    /// Forgets a name, or an id with all its names. The image itself goes with its last tag; its layers at the next [`Store::gc`].
    /// Succeeds if it is unknown.
    pub fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let _lock = self.lock()?;
        let mut refs = self.refs()?;
        let id = match Name::parse(reference)? {
            Name::Id(id) => {
                refs.retain(|_, of| *of != id);
                Some(id)
            }
            Name::Tagged(name) | Name::Digested { name, .. } => refs.remove(&name),
        };
        let Some(id) = id else { return Ok(()) };
        if !refs.iter().any(|(name, of)| *of == id && !name.contains('@')) {
            refs.retain(|_, of| *of != id);
            let path = self.record_path(&id);
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &path)(error)),
                _ => {}
            }
        }
        self.write_refs(&refs)
    }

    /// Deletes layers that no image uses, except those in `in_use` (layer directories of running containers). Returns how many.
    pub fn gc(&self, in_use: &BTreeSet<PathBuf>) -> Result<usize, ImageError> {
        let _lock = self.lock()?;
        let used: BTreeSet<String> = self.records()?.into_iter().flat_map(|record| record.diff_ids).collect();
        let layers = self.dir.join("layers");
        let mut removed = 0;
        for entry in std::fs::read_dir(&layers).map_err(io_error("list", &layers))? {
            let path = entry.map_err(io_error("list", &layers))?.path();
            let digest = format!("sha256:{}", path.file_name().unwrap_or_default().to_string_lossy());
            if !used.contains(&digest) && !in_use.contains(&path.join("fs")) {
                std::fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    // --- for the submodules; the lock is held where things change ---

    fn layer_dir(&self, diff_id: &str) -> PathBuf {
        self.dir.join("layers").join(hex_of(diff_id)).join("fs")
    }

    fn has_layer(&self, diff_id: &str) -> bool {
        self.layer_dir(diff_id).exists()
    }

    /// Unpacks a layer (plain or gzip tar) unless it is there; returns its unpacked size.
    fn add_layer(&self, diff_id: &str, tar: impl io::Read) -> Result<u64, ImageError> {
        let target = self.dir.join("layers").join(hex_of(diff_id));
        let size_file = target.join("size");
        if let Ok(text) = std::fs::read_to_string(&size_file) {
            return Ok(text.trim().parse().unwrap_or(0));
        }
        let work = self.work_dir()?;
        let fs = work.path().join("fs");
        std::fs::create_dir(&fs).map_err(io_error("create", &fs))?;
        let (size, found) = unpack::unpack(tar, &fs, &self.limits)?;
        if found != diff_id {
            return Err(ImageError::Digest {
                what: "layer".to_owned(),
                found,
                wanted: diff_id.to_owned(),
            });
        }
        let size_file = work.path().join("size");
        std::fs::write(&size_file, size.to_string()).map_err(io_error("write", &size_file))?;
        // A half-written directory of that name can only be ours: the lock is held.
        let _ = std::fs::remove_dir_all(&target);
        std::fs::rename(work.path(), &target).map_err(io_error("store layer", &target))?;
        work.keep();
        Ok(size)
    }

    /// Adds the record of an image whose layers are there, and names it.
    fn add_image(
        &self,
        config_bytes: &[u8],
        manifest: Option<&str>,
        names: &[String],
        size_bytes: u64,
    ) -> Result<Image, ImageError> {
        let parsed = parse_config(config_bytes)?;
        let id = digest_of(config_bytes);
        let mut record = self.record(&id)?.unwrap_or(Record {
            id: id.clone(),
            diff_ids: parsed.rootfs.diff_ids,
            config: parsed.config,
            size_bytes,
            manifests: BTreeSet::new(),
        });
        record.manifests.extend(manifest.map(str::to_owned));
        let path = self.record_path(&id);
        self.write_atomic(&path, &serde_json::to_vec(&record).unwrap_or_default())?;
        let mut added = Vec::new();
        for name in names {
            added.push((name.clone(), id.clone()));
            if let (Some(manifest), Some((repository, _))) = (manifest, reference::split_tag(name)) {
                added.push((format!("{repository}@{manifest}"), id.clone()));
            }
        }
        self.set_refs(added)?;
        Ok(self.image(record, &self.refs()?))
    }

    fn image(&self, record: Record, refs: &BTreeMap<String, String>) -> Image {
        let names = refs
            .iter()
            .filter(|(_, id)| **id == record.id)
            .map(|(name, _)| name.clone());
        let (digests, tags) = names.partition(|name| name.contains('@'));
        Image {
            tags,
            digests,
            config: record.config,
            layers: record.diff_ids.iter().rev().map(|id| self.layer_dir(id)).collect(),
            size_bytes: record.size_bytes,
            id: record.id,
        }
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.dir.join("images").join(format!("{}.json", hex_of(id)))
    }

    fn record(&self, id: &str) -> Result<Option<Record>, ImageError> {
        let path = self.record_path(id);
        match std::fs::read(&path) {
            Ok(bytes) => parse_file(&path, &bytes).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    fn records(&self) -> Result<Vec<Record>, ImageError> {
        let dir = self.dir.join("images");
        let mut found = Vec::new();
        let entries = match std::fs::read_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            other => other.map_err(io_error("list", &dir))?,
        };
        for entry in entries {
            let path = entry.map_err(io_error("list", &dir))?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                found.push(parse_file(
                    &path,
                    &std::fs::read(&path).map_err(io_error("read", &path))?,
                )?);
            }
        }
        found.sort_by(|a: &Record, b| a.id.cmp(&b.id));
        Ok(found)
    }

    fn refs(&self) -> Result<BTreeMap<String, String>, ImageError> {
        let path = self.dir.join("refs.json");
        match std::fs::read(&path) {
            Ok(bytes) => parse_file(&path, &bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(io_error("read", &path)(error)),
        }
    }

    fn set_refs(&self, added: impl IntoIterator<Item = (String, String)>) -> Result<(), ImageError> {
        let mut refs = self.refs()?;
        refs.extend(added);
        self.write_refs(&refs)
    }

    fn write_refs(&self, refs: &BTreeMap<String, String>) -> Result<(), ImageError> {
        self.write_atomic(
            &self.dir.join("refs.json"),
            &serde_json::to_vec(refs).unwrap_or_default(),
        )
    }

    fn write_atomic(&self, path: &Path, bytes: &[u8]) -> Result<(), ImageError> {
        let work = self.work_dir()?;
        let fresh = work.path().join("file");
        std::fs::write(&fresh, bytes).map_err(io_error("write", &fresh))?;
        std::fs::rename(&fresh, path).map_err(io_error("write", path))
    }

    fn work_dir(&self) -> Result<WorkDir, ImageError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.dir.join("tmp").join(format!("{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).map_err(io_error("create", &path))?;
        Ok(WorkDir { path: Some(path) })
    }

    /// Blocks until no other process or thread changes the store. Released when dropped.
    fn lock(&self) -> Result<File, ImageError> {
        let (file, path) = self.lock_file()?;
        file.lock().map_err(io_error("lock", &path))?;
        Ok(file)
    }

    fn try_lock(&self) -> Result<Option<File>, ImageError> {
        let (file, path) = self.lock_file()?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(io_error("lock", &path)(error)),
        }
    }

    fn lock_file(&self) -> Result<(File, PathBuf), ImageError> {
        if !self.writable {
            return Err(ImageError::ReadOnly { path: self.dir.clone() });
        }
        let path = self.dir.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        Ok((file, path))
    }
}

/// A directory under `tmp` that goes away unless kept.
struct WorkDir {
    path: Option<PathBuf>,
}

impl WorkDir {
    fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_dir_all(path);
        }
    }
}

/// The parts of an OCI image configuration we use.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default, deserialize_with = "null_as_default")]
    config: ImageConfig,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "null_as_default")]
    diff_ids: Vec<String>,
}

fn parse_config(bytes: &[u8]) -> Result<ConfigFile, ImageError> {
    let parsed: ConfigFile = serde_json::from_slice(bytes).map_err(|error| ImageError::Invalid {
        what: "image configuration".to_owned(),
        reason: error.to_string(),
    })?;
    for id in &parsed.rootfs.diff_ids {
        reference::check_digest(id)?;
    }
    if parsed.rootfs.diff_ids.is_empty() {
        return Err(ImageError::Invalid {
            what: "image configuration".to_owned(),
            reason: "it lists no layers".to_owned(),
        });
    }
    let own = architecture();
    if !parsed.architecture.is_empty() && parsed.architecture != own {
        return Err(ImageError::Platform {
            reference: "this".to_owned(),
            wanted: format!("linux/{own}"),
        });
    }
    Ok(parsed)
}

fn parse_file<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|error| ImageError::Invalid {
        what: path.display().to_string(),
        reason: error.to_string(),
    })
}

/// The architecture's name in image manifests.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn hex_of(digest: &str) -> &str {
    digest.strip_prefix("sha256:").unwrap_or(digest)
}

/// `sha256:<hex>` of bytes.
pub(crate) fn digest_of(bytes: &[u8]) -> String {
    finish_digest(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref())
}

fn finish_digest(hash: &[u8]) -> String {
    use std::fmt::Write;
    hash.iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
