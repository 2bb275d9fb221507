//! `oaks image`: the host's store of images, which every machine and container group of the host reads.

use std::path::Path;

use anyhow::{Context as _, Result};
use sandbox::images::{BuildSpec, Image, ImageConfig, LayerSource, Store};
use serde_json::json;

use crate::{
    access::chained,
    cli::{Output, Settings},
    recipe::Recipe,
};

fn store(settings: &Settings) -> Result<Store> {
    Store::open(settings.paths.images())
        .map_err(chained)
        .context("opening the image store")
}

/// Builds the recipe in `dir` and puts the image into the store.
pub async fn build(settings: &Settings, dir: &Path) -> Result<Image> {
    let (settings, dir) = (settings.clone(), dir.to_path_buf());
    tokio::task::spawn_blocking(move || build_blocking(&settings, &dir)).await?
}

fn build_blocking(settings: &Settings, dir: &Path) -> Result<Image> {
    let recipe = Recipe::read(dir)?;
    let work = settings.paths.data.join("build");
    let rootfs = work.join(format!("rootfs-{}", std::process::id()));
    let built = recipe.assemble(dir, &rootfs, &work.join("debs")).and_then(|()| {
        let spec = BuildSpec {
            reference: recipe.name.clone(),
            layers: vec![LayerSource::Directory(rootfs.clone())],
            config: ImageConfig {
                user: recipe.user.clone().unwrap_or_default(),
                env: recipe.env.iter().map(|(k, v)| format!("{k}={v}")).collect(),
                entrypoint: recipe.entrypoint.clone(),
                cmd: recipe.cmd.clone(),
                working_dir: recipe.working_dir.clone().unwrap_or_default(),
                ..ImageConfig::default()
            },
        };
        store(settings)?.build(&spec).map_err(chained)
    });
    let _ = std::fs::remove_dir_all(&rootfs);
    built.with_context(|| format!("building image {}", recipe.name))
}

pub fn load(settings: &Settings, archive: &Path) -> Result<()> {
    let images = store(settings)?
        .import(archive, None)
        .map_err(chained)
        .with_context(|| format!("loading {}", archive.display()))?;
    for image in images {
        println!("loaded {} {}", image.id, image.tags.join(" "));
    }
    Ok(())
}

pub fn list(settings: &Settings, output: Output) -> Result<()> {
    let images = store(settings)?.list().map_err(chained)?;
    match output {
        Output::Json => {
            let list: Vec<_> = images
                .iter()
                .map(|i| json!({"id": i.id, "tags": i.tags, "sizeBytes": i.size_bytes}))
                .collect();
            println!("{}", serde_json::to_string_pretty(&list)?);
        }
        Output::Table => {
            println!("{:<48} {:<22} {:>10}", "IMAGE", "ID", "SIZE");
            for image in images {
                let id: String = image.id.chars().take(19).collect();
                let size = format!("{:.1} MB", image.size_bytes as f64 / 1e6);
                for tag in &image.tags {
                    println!("{tag:<48} {id:<22} {size:>10}");
                }
                if image.tags.is_empty() {
                    println!("{:<48} {id:<22} {size:>10}", "<none>");
                }
            }
        }
    }
    Ok(())
}
