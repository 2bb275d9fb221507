//! The image that all runtimes run, and the one that holds a pod's namespaces: Debian's static busybox with a web server's
//! folder, as OCI archives. No registry is needed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use serde_json::{Value, json};

use crate::tools::{output, wrapper};

pub const NAME: &str = "oaks.test/busybox:1";
/// A command of the image that holds a pod's namespaces.
pub const PAUSE: &str = "oaks.test/pause:1";
/// Serves `/hello` and `/cgi-bin/who`, which tells the caller's address, at port 80.
pub const SERVE: &[&str] = &["/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/www"];

/// Writes archives of the image and of [`PAUSE`] and returns their paths: podman reads only archives of one image.
pub fn archives(dir: &Path) -> Result<[PathBuf; 2]> {
    Ok([
        archive(dir, "image", NAME, SERVE)?,
        archive(dir, "pause", PAUSE, &["/bin/busybox", "sleep", "2147483647"])?,
    ])
}

fn archive(dir: &Path, file: &str, name: &str, entrypoint: &[&str]) -> Result<PathBuf> {
    let root = dir.join(file);
    for sub in [
        "root/bin",
        "root/www/cgi-bin",
        "root/tmp",
        "root/proc",
        "layout/blobs/sha256",
    ] {
        fs::create_dir_all(root.join(sub))?;
    }
    let busybox = root.join("root/bin/busybox");
    output(Command::new("sh").args(["-c", &format!("cp \"$(command -v busybox)\" {}", busybox.display())]))?;
    std::os::unix::fs::symlink("busybox", root.join("root/bin/sh"))?;
    fs::write(root.join("root/www/hello"), "hello\n")?;
    wrapper(
        &root.join("root/www/cgi-bin/who"),
        r"printf 'Content-Type: text/plain\r\n\r\n%s' $REMOTE_ADDR",
    )?;

    let layout = root.join("layout");
    let layer = layout.join("layer.tar");
    tar(
        &layer,
        &root.join("root"),
        &["--owner=0", "--group=0", "--numeric-owner"],
    )?;
    let layer = blob(&layout, &layer)?;
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Entrypoint": entrypoint, "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}});
    let config = text(&layout, &config, "application/vnd.oci.image.config.v1+json")?;
    let mut layer = layer;
    layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
    let manifest = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer]});
    let mut manifest = text(&layout, &manifest, "application/vnd.oci.image.manifest.v1+json")?;
    manifest["annotations"] = json!({"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name});
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    fs::write(
        layout.join("index.json"),
        json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
    )?;
    let archive = dir.join(format!("{file}.tar"));
    tar(&archive, &layout, &[])?;
    Ok(archive)
}

fn tar(to: &Path, from: &Path, more: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    command.arg("-cf").arg(to).args(more).arg("-C").arg(from).arg(".");
    output(&mut command).map(drop)
}

/// Moves a file to where its digest puts it; its descriptor without a media type.
fn blob(layout: &Path, file: &Path) -> Result<Value> {
    let sum = output(Command::new("sha256sum").arg(file))?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    let size = fs::metadata(file)?.len();
    fs::rename(file, layout.join("blobs/sha256").join(sum))?;
    Ok(json!({ "digest": format!("sha256:{sum}"), "size": size }))
}

fn text(layout: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let file = layout.join("blob");
    fs::write(&file, value.to_string())?;
    let mut descriptor = blob(layout, &file)?;
    descriptor["mediaType"] = json!(media_type);
    Ok(descriptor)
}
