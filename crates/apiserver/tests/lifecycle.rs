//! Clusters come, pause and go in one process.

mod common;

use std::sync::Arc;

use apiserver::{ApiServer, ApiServerConfig, Cluster, ClusterConfig, NoDialer, UserInfo};
use common::call;
use serde_json::json;
use store::{Engine, ModelEngine};

const SECRETS: &str = "/api/v1/namespaces/default/secrets";

async fn open(api: &ApiServer) -> Arc<Cluster> {
    api.create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
        .await
        .unwrap()
}

#[tokio::test]
async fn a_paused_cluster_comes_back_whole_and_a_deleted_one_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let keys = tempfile::tempdir().unwrap();
    let engine = ModelEngine::new();
    let config = ApiServerConfig {
        engine: engine.clone(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.path().to_owned(),
        clock: stdx::RealClock::shared(),
    };
    let api = ApiServer::with_keys(config, keys.path().to_owned());
    let cluster = open(&api).await;
    let admin = cluster.local_service(UserInfo::admin("a"));
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}}).to_string();
    assert_eq!(call(&admin, "POST", SECRETS, "application/json", secret).await.0, 201);
    let ca = cluster.ca_pem().to_owned();
    // The key that opens secrets is where it was asked to be, and nowhere beside what it opens.
    assert!(keys.path().join("c/secrets.key").exists());
    assert!(!dir.path().join("c/pki/secrets.key").exists());

    api.close_cluster("c").await;
    assert!(api.cluster("c").is_none());
    assert_eq!(engine.list_keyspaces(), ["c"], "its data stays");
    let again = open(&api).await;
    assert_eq!(again.ca_pem(), ca);
    let admin = again.local_service(UserInfo::admin("a"));
    let (code, read) = call(&admin, "GET", &format!("{SECRETS}/s"), "", "").await;
    assert_eq!((code, &read["data"]["k"]), (200, &json!("dg==")));

    api.delete_cluster("c").await.unwrap();
    assert_eq!(engine.list_keyspaces(), Vec::<String>::new());
    assert!(!dir.path().join("c").exists() && !keys.path().join("c").exists());
    api.delete_cluster("c").await.unwrap();
    // A new one of the name shares nothing with it.
    let fresh = open(&api).await;
    assert_ne!(fresh.ca_pem(), ca);
    let admin = fresh.local_service(UserInfo::admin("a"));
    assert_eq!(call(&admin, "GET", &format!("{SECRETS}/s"), "", "").await.0, 404);
}

#[tokio::test]
async fn a_key_moves_out_of_the_data_directory_once() {
    let dir = tempfile::tempdir().unwrap();
    let keys = tempfile::tempdir().unwrap();
    let engine = ModelEngine::new();
    let config = || ApiServerConfig {
        engine: engine.clone(),
        dialer: Arc::new(NoDialer),
        data_dir: dir.path().to_owned(),
        clock: stdx::RealClock::shared(),
    };
    let before = ApiServer::new(config());
    let admin = open(&before).await.local_service(UserInfo::admin("a"));
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}}).to_string();
    assert_eq!(call(&admin, "POST", SECRETS, "application/json", secret).await.0, 201);
    before.close_cluster("c").await;
    assert!(dir.path().join("c/pki/secrets.key").exists());
    let after = ApiServer::with_keys(config(), keys.path().to_owned());
    let admin = open(&after).await.local_service(UserInfo::admin("a"));
    assert_eq!(call(&admin, "GET", &format!("{SECRETS}/s"), "", "").await.0, 200);
    assert!(!dir.path().join("c/pki/secrets.key").exists());
    // Without its key the data cannot be read, and that is said.
    after.close_cluster("c").await;
    std::fs::remove_file(keys.path().join("c/secrets.key")).unwrap();
    let error = after
        .create_cluster(ClusterConfig::new("c", "https://127.0.0.1:6443"))
        .await
        .err()
        .unwrap();
    assert!(
        stdx::chain(&error).to_string().contains("sealed with another key"),
        "{error:?}"
    );
}
