//! Pulling from a registry: a small one on the loopback, plain HTTP.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use sandbox::images::{BuildSpec, ImageConfig, ImageError, LayerSource, Store, build_archive};

/// Serves the blobs of an OCI archive as `/v2/team/app`, and counts layer downloads.
struct Registry {
    address: String,
    blobs_sent: Arc<AtomicUsize>,
}

impl Registry {
    fn start(archive: &std::path::Path, damage: bool) -> Self {
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(std::fs::File::open(archive).unwrap())
            .entries()
            .unwrap()
        {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), bytes);
        }
        let index: serde_json::Value = serde_json::from_slice(&files["index.json"]).unwrap();
        let manifest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let blobs_sent = Arc::new(AtomicUsize::new(0));
        let sent = blobs_sent.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (files, manifest, sent) = (files.clone(), manifest.clone(), sent.clone());
                std::thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let mut reader = BufReader::new(stream.try_clone().unwrap());
                    loop {
                        let mut line = String::new();
                        if reader.read_line(&mut line).unwrap_or(0) == 0 {
                            return;
                        }
                        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
                        while line.trim() != "" {
                            line.clear();
                            reader.read_line(&mut line).unwrap();
                        }
                        let blob =
                            |digest: &str| files.get(&format!("blobs/{}", digest.replacen(':', "/", 1))).cloned();
                        let (kind, body) = if path == "/v2/" {
                            ("application/json", Some(b"{}".to_vec()))
                        } else if path == "/v2/team/app/manifests/1" {
                            ("application/vnd.oci.image.manifest.v1+json", blob(&manifest))
                        } else if let Some(digest) = path.strip_prefix("/v2/team/app/blobs/") {
                            sent.fetch_add(1, Ordering::SeqCst);
                            let mut body = blob(digest);
                            if let Some(byte) = body
                                .as_mut()
                                .filter(|body| damage && body.len() > 2000)
                                .and_then(|body| body.first_mut())
                            {
                                *byte ^= 1;
                            }
                            ("application/octet-stream", body)
                        } else {
                            ("application/json", None)
                        };
                        let status = if body.is_some() { "200 OK" } else { "404 Not Found" };
                        let body = body.unwrap_or_else(|| {
                            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#.to_vec()
                        });
                        let head = format!(
                            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
                            body.len()
                        );
                        if stream
                            .write_all(head.as_bytes())
                            .and_then(|()| stream.write_all(&body))
                            .is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        Self { address, blobs_sent }
    }
}

fn archive(dir: &std::path::Path) -> std::path::PathBuf {
    let path = dir.join("image.tar");
    let spec = BuildSpec {
        reference: "team/app:1".into(),
        layers: vec![LayerSource::Files(vec![("/bin/app".into(), vec![b'x'; 5000], 0o755)])],
        config: ImageConfig {
            entrypoint: vec!["/bin/app".into()],
            ..ImageConfig::default()
        },
    };
    build_archive(&spec, &path).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_verified_and_not_fetched_twice() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(&archive(dir.path()), false);
    let store = Store::open(dir.path().join("images")).unwrap();
    let name = format!("{}/team/app:1", registry.address);
    let image = store.pull(&name, None).await.unwrap();
    assert_eq!(
        (image.tags, image.config.entrypoint),
        (vec![name.clone()], vec!["/bin/app".to_owned()])
    );
    assert_eq!(std::fs::read(image.layers[0].join("bin/app")).unwrap().len(), 5000);
    assert_eq!(store.resolve(&image.digests[0]).unwrap().unwrap().id, image.id);
    let before = registry.blobs_sent.load(Ordering::SeqCst);
    store.pull(&name, None).await.unwrap();
    assert_eq!(
        registry.blobs_sent.load(Ordering::SeqCst),
        before + 1,
        "only the configuration is fetched again"
    );
    let missing = store
        .pull(&format!("{}/team/app:2", registry.address), None)
        .await
        .unwrap_err();
    assert!(matches!(missing, ImageError::Registry { .. }), "{missing}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_layer_leaves_no_image() {
    let dir = tempfile::tempdir().unwrap();
    let registry = Registry::start(&archive(dir.path()), true);
    let store = Store::open(dir.path().join("images")).unwrap();
    let error = store
        .pull(&format!("{}/team/app:1", registry.address), None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ImageError::Registry { .. } | ImageError::Digest { .. }),
        "{error}"
    );
    assert!(store.list().unwrap().is_empty());
    assert!(dir.path().join("images/tmp").read_dir().unwrap().next().is_none());
}
