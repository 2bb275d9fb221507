//! Encodings: protobuf and YAML both ways, Table and metadata only, compression.

mod common;

use apimachinery::codec;
use apimachinery::gvk::Gvk;
use apimachinery::table::TypeTable;
use common::{Api, api, body};
use http::Request;
use http_body_util::BodyExt;
use serde_json::{Value, json};
use std::io::Read;
use tower::ServiceExt;

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const PROTOBUF: &str = "application/vnd.kubernetes.protobuf";

async fn send(api: &Api, request: http::request::Builder, data: Vec<u8>) -> (http::response::Parts, Vec<u8>) {
    let request: Request<apiserver::Body> = request.body(body(data)).unwrap();
    let (parts, body) = api.service.clone().oneshot(request).await.unwrap().into_parts();
    (parts, body.collect().await.unwrap().to_bytes().to_vec())
}

fn accept(path: &str, media: &str) -> http::request::Builder {
    Request::builder().uri(path).header("accept", media)
}

#[tokio::test]
async fn protobuf_goes_in_and_comes_out() {
    let api = api().await;
    let table = TypeTable::builtin();
    let gvk = Gvk::new("", "v1", "ConfigMap");
    let object = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "p"}, "data": {"k": "v"}});
    let bytes = codec::to_protobuf(&table, &gvk, &object).unwrap();
    let request = accept(MAPS, PROTOBUF).method("POST").header("content-type", PROTOBUF);
    let (parts, answer) = send(&api, request, bytes).await;
    assert_eq!(
        (parts.status.as_u16(), &parts.headers["content-type"]),
        (201, &http::HeaderValue::from_static(PROTOBUF))
    );
    let made = codec::from_protobuf(&table, &gvk, &answer).unwrap();
    assert_eq!(
        (&made["metadata"]["name"], &made["data"]["k"]),
        (&json!("p"), &json!("v"))
    );

    let (_, answer) = send(&api, accept(MAPS, PROTOBUF), vec![]).await;
    let list = codec::from_protobuf(&table, &Gvk::new("", "v1", "ConfigMapList"), &answer).unwrap();
    assert_eq!(list["items"][0]["metadata"]["name"], "p");
    assert_eq!(list["metadata"]["resourceVersion"], made["metadata"]["resourceVersion"]);
    let (parts, answer) = send(&api, accept(&format!("{MAPS}/nope"), PROTOBUF), vec![]).await;
    assert_eq!(parts.status, 404);
    let status = codec::from_protobuf(&table, &Gvk::new("", "v1", "Status"), &answer).unwrap();
    assert_eq!(status["reason"], "NotFound");

    let request = accept(&format!("{MAPS}?watch=1&timeoutSeconds=1"), PROTOBUF);
    let (parts, stream) = send(&api, request, vec![]).await;
    assert_eq!(
        parts.headers["content-type"],
        "application/vnd.kubernetes.protobuf;stream=watch"
    );
    let length = u32::from_be_bytes(stream[..4].try_into().unwrap()) as usize;
    assert_eq!(stream.len(), 4 + length);
    let (kind, object) = codec::watch_event_from_protobuf(&stream[4..]).unwrap();
    assert_eq!(kind, "ADDED");
    assert_eq!(
        codec::from_protobuf(&table, &gvk, object).unwrap()["metadata"]["name"],
        "p"
    );
}

#[tokio::test]
async fn yaml_goes_in_and_comes_out() {
    let api = api().await;
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: yam\ndata:\n  k: 'yes'\n";
    let request = accept(MAPS, "application/yaml")
        .method("POST")
        .header("content-type", "application/yaml");
    let (parts, answer) = send(&api, request, yaml.into()).await;
    let text = String::from_utf8(answer).unwrap();
    assert!(parts.status == 201, "{text}");
    assert_eq!(
        (parts.status.as_u16(), parts.headers["content-type"].to_str().unwrap()),
        (201, "application/yaml")
    );
    assert!(text.contains("name: yam\n"), "{text}");
}

#[tokio::test]
async fn tables_and_metadata() {
    let api = api().await;
    api.post(MAPS, json!({"metadata": {"name": "a"}, "data": {"k": "v"}}))
        .await;
    let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
    let (_, answer) = send(&api, accept(MAPS, table), vec![]).await;
    let list: Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(
        (&list["kind"], &list["columnDefinitions"][0]["name"]),
        (&json!("Table"), &json!("Name"))
    );
    assert_eq!(list["rows"][0]["cells"][0], "a");
    assert_eq!(list["rows"][0]["object"]["kind"], "PartialObjectMetadata");
    let (_, answer) = send(&api, accept(&format!("{MAPS}?watch=1&timeoutSeconds=1"), table), vec![]).await;
    let event: Value = serde_json::from_slice(answer.split(|b| *b == b'\n').next().unwrap()).unwrap();
    assert_eq!(event["object"]["rows"][0]["cells"][0], "a");

    for media in ["application/json", PROTOBUF] {
        let partial = format!("{media};as=PartialObjectMetadataList;g=meta.k8s.io;v=v1");
        let (parts, answer) = send(&api, accept(MAPS, &partial), vec![]).await;
        assert_eq!(parts.status, 200);
        let list: Value = match media {
            PROTOBUF => {
                let gvk = Gvk::new("meta.k8s.io", "v1", "PartialObjectMetadataList");
                codec::from_protobuf(&TypeTable::builtin(), &gvk, &answer).unwrap()
            }
            _ => serde_json::from_slice(&answer).unwrap(),
        };
        assert_eq!(
            (&list["items"][0]["metadata"]["name"], &list["items"][0]["data"]),
            (&json!("a"), &Value::Null)
        );
    }
    let (parts, _) = send(&api, accept(MAPS, "image/png"), vec![]).await;
    assert_eq!(parts.status, 406);
}

#[tokio::test]
async fn long_lists_are_compressed_for_those_who_ask() {
    let api = api().await;
    for i in 0..40 {
        api.post(
            MAPS,
            json!({"metadata": {"name": format!("m{i}")}, "data": {"k": "v".repeat(5000)}}),
        )
        .await;
    }
    let (parts, plain) = send(&api, accept(MAPS, "application/json"), vec![]).await;
    assert!(parts.headers.get("content-encoding").is_none());
    let (parts, packed) = send(
        &api,
        accept(MAPS, "application/json").header("accept-encoding", "gzip"),
        vec![],
    )
    .await;
    assert_eq!(parts.headers["content-encoding"], "gzip");
    let mut unpacked = Vec::new();
    flate2::read::GzDecoder::new(&packed[..])
        .read_to_end(&mut unpacked)
        .unwrap();
    assert!(unpacked == plain && packed.len() < plain.len() / 10);
    let list: Value = serde_json::from_slice(&plain).unwrap();
    assert_eq!(list["items"].as_array().unwrap().len(), 40);
}

#[tokio::test]
async fn discovery_and_openapi_answer() {
    let api = api().await;
    let aggregated = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
    let (parts, answer) = send(&api, accept("/apis", aggregated), vec![]).await;
    assert!(
        parts.headers["content-type"]
            .to_str()
            .unwrap()
            .contains("APIGroupDiscoveryList")
    );
    let list: Value = serde_json::from_slice(&answer).unwrap();
    assert!(
        list["items"]
            .as_array()
            .unwrap()
            .iter()
            .any(|g| g["metadata"]["name"] == "apps")
    );
    let (_, plain) = api.get("/apis").await;
    assert_eq!(plain["kind"], "APIGroupList");
    let (_, resources) = api.get("/api/v1").await;
    assert_eq!(resources["kind"], "APIResourceList");
    let (_, index) = api.get("/openapi/v3").await;
    let url = index["paths"]["apis/apps/v1"]["serverRelativeURL"]
        .as_str()
        .unwrap()
        .to_owned();
    assert_eq!(api.get(&url).await.0, 200, "{url}");
    let (_, answer) = send(
        &api,
        accept(
            "/openapi/v2",
            "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
        ),
        vec![],
    )
    .await;
    assert!(answer.len() > 10_000 && answer[0] != b'{');
    let (_, metrics) = api.get("/metrics").await;
    assert!(metrics.as_str().unwrap().contains("apiserver_request_total{"));
}
