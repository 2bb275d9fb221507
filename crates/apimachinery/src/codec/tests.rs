use serde_json::json;

use super::*;

fn deployment() -> Gvk {
    Gvk::new("apps", "v1", "Deployment")
}

fn read(media: Media, text: &str, validation: Validation) -> Result<Decoded, DecodeError> {
    decode(&TypeTable::builtin(), &deployment(), media, text.as_bytes(), validation)
}

#[test]
fn unknown_and_duplicate_fields_are_named_with_their_paths() {
    let text = r#"{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"a","labels":{"x":"1","x":"2"}},
        "spec":{"replica":1,"template":{"spec":{"containers":[{"name":"c","Image":"i"}]}}}}"#;
    let error = read(Media::Json, text, Validation::Strict).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Deployment in version \"v1\" cannot be handled as a Deployment: strict decoding error: \
         duplicate field \"metadata.labels.x\", unknown field \"spec.replica\", \
         unknown field \"spec.template.spec.containers[0].Image\""
    );
    let warned = read(Media::Json, text, Validation::Warn).unwrap();
    assert_eq!(warned.warnings.len(), 3);
    assert_eq!(warned.value["metadata"]["labels"]["x"], "2");
    assert!(warned.value["spec"].get("replica").is_none());
    assert!(read(Media::Json, text, Validation::Ignore).unwrap().warnings.is_empty());
}

#[test]
fn wrong_types_name_the_field() {
    let text = r#"{"spec":{"replicas":"three"}}"#;
    let error = read(Media::Json, text, Validation::Ignore).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Deployment in version \"v1\" cannot be handled as a Deployment: json: cannot unmarshal string into \
         Go struct field DeploymentSpec.spec.replicas of type int32"
    );
    let error = read(
        Media::Json,
        r#"{"spec":{"template":{"spec":{"containers":{}}}}}"#,
        Validation::Ignore,
    )
    .unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("field PodSpec.spec.template.spec.containers of type []v1.Container"),
        "{error}"
    );
    assert!(read(Media::Json, r#"{"spec":{"replicas":3000000000}}"#, Validation::Ignore).is_err());
    for bad in ["", "[]", "1", "{", "{} x", "{\"spec\":"] {
        let error = read(Media::Json, bad, Validation::Ignore).unwrap_err();
        assert_eq!(error.to_status().code(), 400, "{bad:?}: {error}");
    }
}

#[test]
fn versions_and_kinds_must_fit() {
    let error = read(
        Media::Json,
        r#"{"apiVersion":"v1","kind":"Deployment"}"#,
        Validation::Ignore,
    )
    .unwrap_err();
    let want = "Deployment in version \"v1\" cannot be handled as a Deployment: no kind \"Deployment\" is registered for \
                version \"v1\"";
    assert_eq!(error.to_string(), want);
    let pod = r#"{"apiVersion":"v1","kind":"Pod"}"#;
    let error = read(Media::Json, pod, Validation::Ignore).unwrap_err();
    let want = "the API version in the data (v1) does not match the expected API version (apps/v1)";
    assert_eq!(error.to_string(), want);
    assert!(read(Media::Json, r#"{"kind":"Pod"}"#, Validation::Ignore).is_err());
    let filled = read(Media::Json, "{}", Validation::Ignore).unwrap().value;
    assert_eq!(filled, json!({"apiVersion": "apps/v1", "kind": "Deployment"}));
}

#[test]
fn nulls_are_absent_and_values_are_canonical() {
    let text = r#"{"metadata":{"creationTimestamp":null,"annotations":{"a":null},"deletionTimestamp":"2024-01-02T03:04:05.678+01:00"},
        "spec":{"paused":null,"template":{"spec":{"containers":[{"name":"c","resources":{"limits":{"cpu":2}}}]}}}}"#;
    let value = read(Media::Json, text, Validation::Strict).unwrap().value;
    assert_eq!(
        value["metadata"],
        json!({"annotations": {"a": ""}, "deletionTimestamp": "2024-01-02T02:04:05Z"})
    );
    assert_eq!(
        value["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"],
        "2"
    );
    assert!(value["spec"].get("paused").is_none());
}

#[test]
fn yaml_reads_as_json_does() {
    let text =
        "metadata:\n  name: a\n  labels: &l {app: web, 1: one}\nspec:\n  replicas: 2\n  selector: {matchLabels: *l}\n";
    let value = read(Media::Yaml, text, Validation::Strict).unwrap().value;
    assert_eq!(
        value["spec"]["selector"]["matchLabels"],
        json!({"app": "web", "1": "one"})
    );
    let error = read(Media::Yaml, "spec:\n  replicas: 1\n  replicas: 2\n", Validation::Strict).unwrap_err();
    assert!(
        error.to_string().contains("duplicate field \"spec.replicas\""),
        "{error}"
    );
    assert!(read(Media::Yaml, "a: [", Validation::Ignore).is_err());
    assert!(read(Media::Yaml, "a: 1\n---\nb: 2\n", Validation::Ignore).is_err());
    let bomb = (0..12).fold("a0: &a0 [x,x]\n".to_owned(), |mut s, i| {
        s += &format!(
            "a{}: &a{} [*a{i},*a{i},*a{i},*a{i},*a{i},*a{i},*a{i},*a{i}]\n",
            i + 1,
            i + 1
        );
        s
    });
    assert!(read(Media::Yaml, &bomb, Validation::Ignore).is_err());
}

#[test]
fn limits_hold() {
    let deep = format!("{{\"metadata\":{}{}}}", "{\"a\":".repeat(5000), "}".repeat(5000));
    assert!(read(Media::Json, &deep, Validation::Ignore).is_err());
    let long = format!("{{\"metadata\":{{\"name\":\"{}\"}}}}", "x".repeat(BODY_BYTES_MAX));
    assert_eq!(
        read(Media::Json, &long, Validation::Ignore)
            .unwrap_err()
            .to_status()
            .code(),
        413
    );
}

#[test]
fn options_come_with_any_version() {
    let table = TypeTable::builtin();
    let gvk = Gvk::new("", "v1", "DeleteOptions");
    let text = br#"{"apiVersion":"apps/v1","kind":"DeleteOptions","preconditions":{"uid":"u"},"propagationPolicy":"Foreground"}"#;
    let got = decode(&table, &gvk, Media::Json, text, Validation::Strict).unwrap();
    assert_eq!(got.value["preconditions"]["uid"], "u");
}

#[test]
fn yaml_text_reads_back_and_keeps_long_lines() {
    let value = json!({"a": "yes", "b": "1", "c": "true", "d": "x y ".repeat(100), "e": "l1\nl2\n", "f": [1, null, {}],
        "g": "", "h": "2024-01-01", "i": "0x1f", "j": "~", "k": "on", "l": "- x: y", "m": "1e3", "n": " pad "});
    let text = to_yaml(&value);
    assert_eq!(parse_untyped(Media::Yaml, text.as_bytes()).unwrap(), value);
    assert!(text.lines().any(|l| l.len() > 400), "{text}");
    assert!(!text.contains("k: on") && !text.contains("a: yes"), "{text}");
}
