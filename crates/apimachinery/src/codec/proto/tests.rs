use std::io::Read;

use serde_json::json;

use super::*;
use crate::codec::{Media, Validation, decode, decode_value};

/// Kind to (object, protobuf), from the published goldens.
fn goldens() -> Vec<(String, Value, Vec<u8>)> {
    let packed: &[u8] = include_bytes!("../../../data/golden.json.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut text).unwrap();
    let all: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
    let hex = |s: &str| {
        (0..s.len() / 2)
            .map(|i| u8::from_str_radix(&s[2 * i..2 * i + 2], 16).unwrap())
            .collect()
    };
    all.into_iter()
        .map(|(k, mut v)| (k, v["json"].take(), hex(v["pb"].as_str().unwrap())))
        .collect()
}

#[test]
fn every_golden_round_trips_both_ways() {
    let table = TypeTable::builtin();
    let all = goldens();
    assert!(all.len() >= 56);
    for (name, object, bytes) in all {
        let gvk = Gvk::of(&object).unwrap();
        let strict =
            decode_value(&table, &gvk, object.clone(), Validation::Strict).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(strict.value, object, "{name}: JSON to tree");
        let encoded = to_protobuf(&table, &gvk, &object).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(encoded == bytes, "{name}: JSON to protobuf differs");
        let decoded = decode(&table, &gvk, Media::Protobuf, &bytes, Validation::Strict).unwrap();
        assert_eq!(decoded.value, object, "{name}: protobuf to JSON");
    }
}

#[test]
fn lists_status_and_zero_values_round_trip() {
    let table = TypeTable::builtin();
    let gvk = Gvk::new("apps", "v1", "Deployment");
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"},
        "spec": {"replicas": 0, "selector": {}, "template": {"spec": {"volumes": [{"name": "v", "emptyDir": {}}],
        "containers": [{"name": "c", "ports": [{"containerPort": -1}]}]}}}});
    let bytes = to_protobuf(&table, &gvk, &object).unwrap();
    assert_eq!(from_protobuf(&table, &gvk, &bytes).unwrap(), object);
    let list =
        json!({"apiVersion": "apps/v1", "kind": "DeploymentList", "metadata": {"resourceVersion": "7"}, "items": []});
    let gvk = gvk.with_kind("DeploymentList");
    assert_eq!(
        from_protobuf(&table, &gvk, &to_protobuf(&table, &gvk, &list).unwrap()).unwrap(),
        list
    );
    let status = crate::status::Status::not_found("pods", "x").to_value();
    let gvk = Gvk::new("", "v1", "Status");
    assert_eq!(
        from_protobuf(&table, &gvk, &to_protobuf(&table, &gvk, &status).unwrap()).unwrap(),
        status
    );
}

#[test]
fn watch_events_are_framed() {
    let frame = watch_event_to_protobuf("ADDED", b"k8s\0x");
    let length = u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize;
    assert_eq!(length, frame.len() - 4);
    assert_eq!(
        watch_event_from_protobuf(&frame[4..]).unwrap(),
        ("ADDED".to_owned(), &b"k8s\0x"[..])
    );
}

#[test]
fn damaged_bytes_are_errors_and_never_panics() {
    let table = TypeTable::builtin();
    let (_, object, bytes) = goldens().into_iter().find(|(n, ..)| n == "apps.v1.Deployment").unwrap();
    let gvk = Gvk::of(&object).unwrap();
    assert_eq!(from_protobuf(&table, &gvk, b"{}"), Err(ProtoError::Magic));
    for cut in (4..bytes.len()).step_by(7) {
        let _ = from_protobuf(&table, &gvk, &bytes[..cut]);
        let mut flipped = bytes.clone();
        flipped[cut] ^= 0xff;
        let _ = from_protobuf(&table, &gvk, &flipped);
    }
}

/// Pointers to every value of a tree.
fn pointers(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(k, v)| pointers(v, &format!("{at}/{}", k.replace('/', "~1")), out)),
        Value::Array(list) => list
            .iter()
            .enumerate()
            .for_each(|(i, v)| pointers(v, &format!("{at}/{i}"), out)),
        _ => {}
    }
}

/// Drops what the protobuf wire cannot tell from absence: empty lists, maps and structures.
fn pruned(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .map(|(k, v)| (k, pruned(v)))
            .filter(|(_, v)| !v.is_null() && *v != json!({}) && *v != json!([]))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        Value::Array(list) => list.into_iter().map(pruned).collect(),
        other => other,
    }
}

#[test]
fn objects_that_lack_any_one_part_round_trip() {
    let table = TypeTable::builtin();
    for (name, object, _) in goldens()
        .into_iter()
        .filter(|(n, ..)| n.ends_with("Service") || n.ends_with("Slice") || n.ends_with("Event"))
    {
        let gvk = Gvk::of(&object).unwrap();
        let mut all = Vec::new();
        pointers(&object, "", &mut all);
        // The kind itself travels in the envelope.
        for place in all
            .iter()
            .filter(|p| !matches!(p.as_str(), "" | "/apiVersion" | "/kind"))
        {
            let mut part = object.clone();
            let (parent, last) = place.rsplit_once('/').unwrap();
            match part.pointer_mut(parent).unwrap() {
                Value::Object(map) => drop(map.remove(&last.replace("~1", "/"))),
                Value::Array(list) => drop(list.remove(last.parse().unwrap())),
                _ => continue,
            }
            let bytes = to_protobuf(&table, &gvk, &part).unwrap();
            let back = from_protobuf(&table, &gvk, &bytes).unwrap();
            assert_eq!(pruned(back), pruned(part), "{name} without {place}");
        }
    }
}
