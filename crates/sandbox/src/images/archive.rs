//! Reading image archives: OCI layouts and `docker save` files in a tar, in place by offset, without unpacking the outer tar.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use serde::Deserialize;

use super::{Image, ImageError, Name, Store, architecture, digest_of, io_error, parse_config, reference::check_digest};

/// Manifests and configurations; real ones are some kilobytes.
const DOCUMENT_BYTES_MAX: u64 = 8 << 20;
/// Nested indexes: an index of indexes is the deepest in use.
const INDEX_DEPTH_MAX: u32 = 4;

const NAME_KEYS: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: String,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An archive's files by name: where they lie in the tar.
struct Files {
    tar: File,
    entries: BTreeMap<String, (u64, u64)>,
}

pub(super) fn import(store: &Store, archive: &Path, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
    let name = name.map(|name| Name::parse(name).map(Name::key)).transpose()?;
    let mut files = Files::open(store, archive)?;
    if files.entries.contains_key("index.json") {
        let index: Index = files.json("index.json")?;
        let mut images = Vec::new();
        for entry in index.manifests {
            let names = match &name {
                Some(name) => vec![name.clone()],
                None => names_of(&entry),
            };
            if let Some(image) = files.import_oci(store, &entry, &names, INDEX_DEPTH_MAX)? {
                images.push(image);
            }
        }
        // An archive of other platforms only is not a success.
        if images.is_empty() {
            return Err(ImageError::Platform {
                reference: archive.display().to_string(),
                wanted: format!("linux/{}", architecture()),
            });
        }
        return Ok(images);
    }
    if files.entries.contains_key("manifest.json") {
        let list: Vec<DockerImage> = files.json("manifest.json")?;
        return list
            .into_iter()
            .map(|image| files.import_docker(store, image, name.as_deref()))
            .collect();
    }
    Err(ImageError::Invalid {
        what: archive.display().to_string(),
        reason: "neither index.json (OCI) nor manifest.json (docker) is in it".to_owned(),
    })
}

/// Whole names only: a bare tag (`latest`) says nothing about the repository.
fn names_of(entry: &Descriptor) -> Vec<String> {
    let given = NAME_KEYS.iter().filter_map(|key| entry.annotations.get(*key));
    let whole = given.filter(|name| name.contains(['/', ':']));
    whole
        .filter_map(|name| Name::parse(name).ok())
        .map(Name::key)
        .take(1)
        .collect()
}

impl Files {
    fn open(store: &Store, archive: &Path) -> Result<Self, ImageError> {
        let failed = |error| io_error("read", archive)(error);
        let mut tar = File::open(archive).map_err(failed)?;
        let mut magic = [0; 2];
        let is_gzip = tar.read(&mut magic).map_err(failed)? == 2 && magic == [0x1f, 0x8b];
        tar.seek(SeekFrom::Start(0)).map_err(failed)?;
        if is_gzip {
            // Offsets need a plain file: it lives without a name until we are done.
            let work = store.work_dir()?;
            let plain_path = work.path().join("plain.tar");
            let mut plain = File::options()
                .create_new(true)
                .read(true)
                .write(true)
                .open(&plain_path)
                .map_err(io_error("create", &plain_path))?;
            let limit = store.limits.bytes_max;
            let mut unzipped = flate2::read::MultiGzDecoder::new(io::BufReader::new(tar)).take(limit + 1);
            if io::copy(&mut unzipped, &mut plain).map_err(failed)? > limit {
                return Err(ImageError::TooLarge {
                    reason: format!("more than {limit} bytes"),
                });
            }
            tar = plain;
            tar.seek(SeekFrom::Start(0)).map_err(failed)?;
        }
        let mut entries = BTreeMap::new();
        let mut reader = tar::Archive::new(tar.try_clone().map_err(failed)?);
        for entry in reader.entries_with_seek().map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.header().entry_type().is_file() {
                let name = String::from_utf8_lossy(&entry.path_bytes())
                    .trim_start_matches("./")
                    .to_owned();
                entries.insert(name, (entry.raw_file_position(), entry.size()));
            }
        }
        Ok(Self { tar, entries })
    }

    fn open_file(&mut self, name: &str) -> Result<impl Read, ImageError> {
        let missing = || ImageError::Invalid {
            what: "image archive".to_owned(),
            reason: format!("{name} is missing"),
        };
        let (offset, size) = *self.entries.get(name).ok_or_else(missing)?;
        self.tar.seek(SeekFrom::Start(offset)).map_err(ImageError::Layer)?;
        Ok((&self.tar).take(size))
    }

    fn bytes(&mut self, name: &str) -> Result<Vec<u8>, ImageError> {
        if self
            .entries
            .get(name)
            .is_some_and(|(_, size)| *size > DOCUMENT_BYTES_MAX)
        {
            return Err(ImageError::TooLarge {
                reason: format!("{name} has more than {DOCUMENT_BYTES_MAX} bytes"),
            });
        }
        let mut bytes = Vec::new();
        self.open_file(name)?
            .read_to_end(&mut bytes)
            .map_err(ImageError::Layer)?;
        Ok(bytes)
    }

    fn json<T: serde::de::DeserializeOwned>(&mut self, name: &str) -> Result<T, ImageError> {
        let bytes = self.bytes(name)?;
        serde_json::from_slice(&bytes).map_err(|error| ImageError::Invalid {
            what: name.to_owned(),
            reason: error.to_string(),
        })
    }

    /// A document by digest, verified.
    fn blob(&mut self, digest: &str) -> Result<Vec<u8>, ImageError> {
        check_digest(digest)?;
        let bytes = self.bytes(&blob_path(digest))?;
        let found = digest_of(&bytes);
        if found == digest {
            Ok(bytes)
        } else {
            Err(ImageError::Digest {
                what: "blob".to_owned(),
                found,
                wanted: digest.to_owned(),
            })
        }
    }

    /// `None` if the entry is for another platform.
    fn import_oci(
        &mut self,
        store: &Store,
        entry: &Descriptor,
        names: &[String],
        depth: u32,
    ) -> Result<Option<Image>, ImageError> {
        let bad = |reason: String| ImageError::Invalid {
            what: format!("manifest {}", entry.digest),
            reason,
        };
        if !matches_platform(entry) {
            return Ok(None);
        }
        let bytes = self.blob(&entry.digest)?;
        if entry.media_type.contains("index") || entry.media_type.contains("manifest.list") {
            let index: Index = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
            if depth == 0 {
                return Err(bad("indexes are nested too deeply".to_owned()));
            }
            for inner in index.manifests {
                if let Some(image) = self.import_oci(store, &inner, names, depth - 1)? {
                    return Ok(Some(image));
                }
            }
            return Ok(None);
        }
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| bad(error.to_string()))?;
        let config = self.blob(&manifest.config.digest)?;
        let paths = manifest
            .layers
            .iter()
            .map(|layer| check_digest(&layer.digest).map(|()| blob_path(&layer.digest)));
        let paths = paths.collect::<Result<Vec<_>, _>>()?;
        self.finish(store, &config, &paths, Some(&entry.digest), names)
            .map(Some)
    }

    fn import_docker(&mut self, store: &Store, image: DockerImage, name: Option<&str>) -> Result<Image, ImageError> {
        let config = self.bytes(&image.config)?;
        let names = match name {
            Some(name) => vec![name.to_owned()],
            None => {
                let tags = image.repo_tags.unwrap_or_default();
                tags.iter()
                    .map(|tag| Name::parse(tag).map(Name::key))
                    .collect::<Result<_, _>>()?
            }
        };
        self.finish(store, &config, &image.layers, None, &names)
    }

    fn finish(
        &mut self,
        store: &Store,
        config: &[u8],
        layers: &[String],
        manifest: Option<&str>,
        names: &[String],
    ) -> Result<Image, ImageError> {
        if names.is_empty() {
            return Err(ImageError::Invalid {
                what: "image archive".to_owned(),
                reason: "the image has no name in it: give one".to_owned(),
            });
        }
        let diff_ids = parse_config(config)?.rootfs.diff_ids;
        if diff_ids.len() != layers.len() {
            return Err(ImageError::Invalid {
                what: "image archive".to_owned(),
                reason: format!(
                    "{} layers, but the configuration lists {}",
                    layers.len(),
                    diff_ids.len()
                ),
            });
        }
        let mut size = config.len() as u64;
        for (diff_id, path) in diff_ids.iter().zip(layers) {
            size += store.add_layer(diff_id, self.open_file(path)?)?;
        }
        store.add_image(config, manifest, names, size)
    }
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replacen(':', "/", 1))
}

/// No platform in the entry means the only one there is; attestations call themselves `unknown`.
fn matches_platform(entry: &Descriptor) -> bool {
    entry
        .platform
        .as_ref()
        .is_none_or(|platform| platform.os == "linux" && platform.architecture == architecture())
}
