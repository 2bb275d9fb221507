use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

use tar::{Builder, EntryType, Header};

use super::*;

fn store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("images")).unwrap();
    (dir, store)
}

/// A tar of raw entries; names are written as they are, hostile ones too.
fn tar(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, data) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(if kind.is_dir() { 0o750 } else { 0o4755 });
        header.set_uid(1234);
        header.set_gid(4321);
        header.set_mtime(1000);
        let bytes = &mut header.as_gnu_mut().unwrap().name;
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        let content = if matches!(kind, EntryType::Symlink | EntryType::Link) {
            header.set_link_name_literal(data).unwrap();
            ""
        } else {
            data
        };
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

fn unpack_to(dir: &Path, bytes: &[u8]) -> Result<(u64, String), ImageError> {
    std::fs::create_dir_all(dir).unwrap();
    unpack::unpack(bytes, dir, &UnpackLimits::default())
}

use EntryType::{Char, Directory, Link, Regular, Symlink};

#[test]
fn files_keep_owner_mode_links_and_times() {
    let (dir, _) = store();
    let fs = dir.path().join("fs");
    let bytes = tar(&[
        (Directory, "./a/", ""),
        (Regular, "a/file", "hello"),
        (Link, "a/hard", "a/file"),
        (Symlink, "a/soft", "/a/file"),
        (Regular, "deep/in/side", "x"),
    ]);
    let (size, digest) = unpack_to(&fs, &bytes).unwrap();
    assert_eq!((size, digest), (6, digest_of(&bytes)));
    let file = fs.join("a/file").metadata().unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777, file.mtime(), file.nlink()),
        (1234, 4321, 0o4755, 1000, 2)
    );
    assert_eq!(fs.join("a").metadata().unwrap().mode() & 0o7777, 0o750);
    assert_eq!(std::fs::read_link(fs.join("a/soft")).unwrap(), Path::new("/a/file"));
    assert_eq!(std::fs::read_to_string(fs.join("deep/in/side")).unwrap(), "x");
}

#[test]
fn whiteouts_become_overlay_marks() {
    let (dir, _) = store();
    let fs = dir.path().join("fs");
    let bytes = tar(&[
        (Directory, "d", ""),
        (Regular, "d/.wh..wh..opq", ""),
        (Regular, "d/.wh.gone", ""),
        (Regular, "d/.wh..wh.plnk", ""),
    ]);
    unpack_to(&fs, &bytes).unwrap();
    let gone = fs.join("d/gone").symlink_metadata().unwrap();
    assert!(gone.file_type().is_char_device() && gone.rdev() == 0);
    let mut value = [0; 4];
    let len = rustix::fs::getxattr(fs.join("d"), "trusted.overlay.opaque", &mut value).unwrap();
    assert_eq!(&value[..len], b"y");
    let names: Vec<_> = std::fs::read_dir(fs.join("d"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["gone"]);
}

#[test]
fn nothing_leaves_the_layer() {
    let (dir, _) = store();
    for (case, entries) in [
        &[(Regular, "../evil", "x")][..],
        &[(Regular, "a/../../evil", "x")],
        &[(Link, "hard", "../../etc/passwd")],
        &[(Link, "hard", "etc/passwd")],
        &[(Char, "null", "")],
    ]
    .into_iter()
    .enumerate()
    {
        let result = unpack_to(&dir.path().join(format!("fs{case}")), &tar(entries));
        assert!(matches!(result, Err(ImageError::Entry { .. })), "{case}: {result:?}");
    }
    // A symlink out of the layer is followed inside the layer.
    let outside = dir.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let link = outside.to_str().unwrap().to_owned();
    let fs = dir.path().join("fs");
    unpack_to(
        &fs,
        &tar(&[
            (Symlink, "out", &link),
            (Symlink, "up", "../../../.."),
            (Regular, "up/x", "x"),
        ]),
    )
    .unwrap();
    let result = unpack_to(&fs, &tar(&[(Regular, "out/evil", "x")]));
    assert!(outside.read_dir().unwrap().next().is_none(), "{result:?}");
    assert!(!dir.path().join("evil").exists() && fs.join("x").exists());
}

#[test]
fn large_and_damaged_layers_are_refused() {
    let (dir, _) = store();
    let bytes = tar(&[(Regular, "a", &"x".repeat(2000)), (Regular, "b", "y")]);
    let limited = |bytes_max, entries_max| {
        let fs = tempfile::tempdir_in(dir.path()).unwrap();
        unpack::unpack(bytes.as_slice(), fs.path(), &UnpackLimits { bytes_max, entries_max })
    };
    assert!(matches!(limited(1999, 10), Err(ImageError::TooLarge { .. })));
    assert!(matches!(limited(5000, 1), Err(ImageError::TooLarge { .. })));
    assert!(unpack_to(&dir.path().join("cut"), &bytes[..700]).is_err());
    let zstd = unpack_to(&dir.path().join("zstd"), &[0x28, 0xb5, 0x2f, 0xfd, 0]);
    assert!(matches!(zstd, Err(ImageError::Unsupported { .. })));
}

fn spec(reference: &str, files: &[(&str, &str)]) -> BuildSpec {
    let files = files
        .iter()
        .map(|(path, content)| (PathBuf::from(path), content.as_bytes().to_vec(), 0o755))
        .collect();
    let config = ImageConfig {
        entrypoint: vec!["/bin/app".into()],
        env: vec!["A=1".into()],
        user: "1000".into(),
        ..ImageConfig::default()
    };
    BuildSpec {
        reference: reference.into(),
        layers: vec![LayerSource::Files(files)],
        config,
    }
}

#[test]
fn built_images_resolve_by_every_name_and_layers_are_shared() {
    let (_dir, store) = store();
    let image = store.build(&spec("app", &[("/bin/app", "#!")])).unwrap();
    assert_eq!(image.tags, ["docker.io/library/app:latest"]);
    assert_eq!(image.config.entrypoint, ["/bin/app"]);
    assert_eq!(std::fs::read_to_string(image.layers[0].join("bin/app")).unwrap(), "#!");
    for name in [
        "app",
        "app:latest",
        "docker.io/library/app",
        &image.id,
        &image.digests[0],
    ] {
        assert_eq!(store.resolve(name).unwrap().as_ref(), Some(&image), "{name}");
    }
    assert_eq!(store.resolve("other").unwrap(), None);
    let again = store.build(&spec("app:2", &[("/bin/app", "#!")])).unwrap();
    assert_eq!((again.layers, again.id), (image.layers.clone(), image.id.clone()));
    let reader = Store::open_read_only(store.dir());
    assert_eq!(reader.list().unwrap().len(), 1);
    assert!(matches!(reader.remove("app"), Err(ImageError::ReadOnly { .. })));

    store.remove("app").unwrap();
    assert!(store.resolve("app").unwrap().is_none() && store.resolve("app:2").unwrap().is_some());
    assert_eq!(store.gc(&BTreeSet::new()).unwrap(), 0);
    store.remove("app:2").unwrap();
    store.remove("app:2").unwrap();
    assert!(store.list().unwrap().is_empty());
    assert_eq!(store.gc(&BTreeSet::from([image.layers[0].clone()])).unwrap(), 0);
    assert_eq!(store.gc(&BTreeSet::new()).unwrap(), 1);
}

#[test]
fn a_directory_becomes_a_layer_with_everything_in_it() {
    let (dir, store) = store();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("bin")).unwrap();
    std::fs::write(root.join("bin/a"), "a").unwrap();
    std::fs::set_permissions(root.join("bin/a"), std::fs::Permissions::from_mode(0o4711)).unwrap();
    std::fs::hard_link(root.join("bin/a"), root.join("bin/b")).unwrap();
    std::os::unix::fs::symlink("a", root.join("bin/c")).unwrap();
    std::os::unix::fs::chown(root.join("bin"), Some(7), Some(8)).unwrap();
    let mut spec = spec("dir", &[("/etc/extra", "e")]);
    spec.layers.insert(0, LayerSource::Directory(root));
    let image = store.build(&spec).unwrap();
    assert_eq!(image.layers.len(), 2);
    let fs = &image.layers[1];
    let a = fs.join("bin/a").metadata().unwrap();
    assert_eq!((a.nlink(), a.mode() & 0o7777), (2, 0o4711));
    assert_eq!(fs.join("bin").metadata().unwrap().uid(), 7);
    assert_eq!(std::fs::read_link(fs.join("bin/c")).unwrap(), Path::new("a"));
    // Top layer first.
    assert!(image.layers[0].join("etc/extra").exists());
}

#[test]
fn archives_of_both_kinds_are_imported_also_compressed() {
    let (dir, store) = store();
    let oci = dir.path().join("oci.tar");
    build_archive(&spec("from/oci:1", &[("/f", "oci")]), &oci).unwrap();
    let gz = dir.path().join("oci.tar.gz");
    let mut encoder = flate2::write::GzEncoder::new(File::create(&gz).unwrap(), flate2::Compression::fast());
    io::copy(&mut File::open(&oci).unwrap(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    let images = store.import(&gz, None).unwrap();
    assert_eq!(images[0].tags, ["docker.io/from/oci:1"]);
    assert_eq!(store.import(&oci, Some("renamed")).unwrap()[0].tags.len(), 2);

    let layer = tar(&[(Regular, "file", "docker")]);
    let config = format!(
        r#"{{"architecture":"{}","os":"linux","config":{{"Cmd":["sh"],"Env":null}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        architecture(),
        digest_of(&layer)
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["dock:9"],"Layers":["l/layer.tar"]}]"#;
    let docker = |config: &str| {
        let path = dir.path().join("docker.tar");
        let mut builder = Builder::new(File::create(&path).unwrap());
        for (name, bytes) in [
            ("manifest.json", manifest.as_bytes()),
            ("c.json", config.as_bytes()),
            ("l/layer.tar", &layer),
        ] {
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            builder.append_data(&mut header, name, bytes).unwrap();
        }
        builder.into_inner().unwrap();
        store.import(&path, None)
    };
    let image = docker(&config).unwrap().remove(0);
    assert_eq!(
        (image.tags[0].as_str(), image.config.cmd[0].as_str()),
        ("docker.io/library/dock:9", "sh")
    );
    // A layer that is not the one the configuration names.
    let wrong = config.replace(&digest_of(&layer), &digest_of(b"other"));
    assert!(matches!(docker(&wrong), Err(ImageError::Digest { .. })));
    assert!(matches!(
        docker(&config.replace(architecture(), "s390x")),
        Err(ImageError::Platform { .. })
    ));
    assert!(store.import(&dir.path().join("none"), None).is_err());
    assert!(
        store.dir().join("tmp").read_dir().unwrap().next().is_none(),
        "work directories are left"
    );
}
