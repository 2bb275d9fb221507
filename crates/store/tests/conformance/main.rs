//! One suite that every engine passes, and what only a durable engine promises.

mod etcd;

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use store::{Batch, Check, Engine, Entry, Error, Keyspace, LocalEngine, ModelEngine, Observer, Op, WatchError};

fn entries(keyspace: &dyn Keyspace, prefix: &str) -> Vec<(String, String, u64)> {
    let mut all = Vec::new();
    let mut push = |e: Entry| {
        all.push((
            String::from_utf8_lossy(&e.key).into_owned(),
            String::from_utf8_lossy(&e.value).into_owned(),
            e.mod_rev,
        ));
    };
    keyspace.range(prefix.as_bytes(), &mut push).unwrap();
    all
}

async fn put(keyspace: &dyn Keyspace, key: &str, value: &str) -> u64 {
    keyspace
        .txn(vec![], vec![Op::put(key.to_owned(), value.to_owned())])
        .await
        .unwrap()
}

#[derive(Default)]
struct Seen(Mutex<Vec<u64>>);

impl Observer for Seen {
    fn committed(&self, batch: &Batch) {
        self.0.lock().push(batch.revision);
    }
}

async fn checks_decide(engine: &dyn Engine) {
    let ks = engine.keyspace("checks").unwrap();
    let r1 = ks.txn(vec![Check::absent("a")], vec![Op::put("a", "1")]).await.unwrap();
    let again = ks
        .txn(vec![Check::absent("a")], vec![Op::put("a", "2")])
        .await
        .unwrap_err();
    assert!(
        matches!(again, Error::Conflict { expected: 0, found, .. } if found == r1),
        "{again}"
    );
    let r2 = ks
        .txn(vec![Check::at("a", r1)], vec![Op::put("a", "2"), Op::put("b", "x")])
        .await
        .unwrap();
    assert!(r2 > r1);
    assert!(
        ks.txn(vec![Check::at("a", r1)], vec![Op::delete("b")])
            .await
            .unwrap_err()
            .is_conflict()
    );
    assert_eq!(
        entries(&*ks, ""),
        [("a".into(), "2".into(), r2), ("b".into(), "x".into(), r2)]
    );
    let r3 = ks.txn(vec![Check::at("b", r2)], vec![Op::delete("b")]).await.unwrap();
    ks.txn(vec![Check::absent("b")], vec![Op::put("b", "y")]).await.unwrap();
    assert!(ks.revision() > r3);
    assert_eq!(entries(&*ks, "b").len(), 1);
}

async fn watch_is_ordered_and_bounded(engine: &dyn Engine) {
    let ks = engine.keyspace("watch").unwrap();
    let start = ks.revision();
    let mut early = ks.watch(start).unwrap();
    let mut revisions = Vec::new();
    for i in 0..20 {
        revisions.push(put(&*ks, "k", &i.to_string()).await);
    }
    let mut seen = Vec::new();
    for _ in 0..20 {
        seen.push(early.next().await.unwrap().revision);
    }
    assert_eq!(seen, revisions);
    let mut middle = ks.watch(revisions[9]).unwrap();
    assert_eq!(middle.next().await.unwrap().revision, revisions[10]);
    for i in 0..1100 {
        put(&*ks, "k", &i.to_string()).await;
    }
    assert!(matches!(early.next().await, Err(WatchError::Compacted { .. })));
    assert!(matches!(ks.watch(start), Err(WatchError::Compacted { .. })));
}

async fn observer_sees_before_the_answer(engine: &dyn Engine) {
    let ks = engine.keyspace("observer").unwrap();
    let seen = Arc::new(Seen::default());
    ks.observe(seen.clone());
    let writers = (0..8).map(|w| {
        let (ks, seen) = (ks.clone(), seen.clone());
        tokio::spawn(async move {
            for i in 0..50 {
                let rev = put(&*ks, &format!("{w}/{i}"), "v").await;
                assert!(seen.0.lock().contains(&rev));
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.unwrap();
    }
    let seen = seen.0.lock();
    assert_eq!(seen.len(), 400);
    assert!(seen.windows(2).all(|w| w[0] < w[1]));
}

async fn attachments_travel(engine: &dyn Engine) {
    let ks = engine.keyspace("attach").unwrap();
    let mut watch = ks.watch(ks.revision()).unwrap();
    ks.txn(vec![], vec![Op::put("a", "1").with(Arc::new(7_u32))])
        .await
        .unwrap();
    let batch = watch.next().await.unwrap();
    let Op::Put {
        attachment: Some(attachment),
        ..
    } = &batch.ops[0]
    else {
        panic!("{batch:?}")
    };
    assert_eq!(attachment.downcast_ref::<u32>(), Some(&7));
}

async fn keyspaces_are_apart_and_droppable(engine: &dyn Engine) {
    let (one, two) = (engine.keyspace("one").unwrap(), engine.keyspace("two").unwrap());
    put(&*one, "k", "1").await;
    assert!(entries(&*two, "").is_empty());
    assert!(engine.list_keyspaces().contains(&"two".to_owned()));
    engine.drop_keyspace("one").await.unwrap();
    engine.drop_keyspace("one").await.unwrap();
    assert!(!engine.list_keyspaces().contains(&"one".to_owned()));
    assert!(matches!(
        one.txn(vec![], vec![Op::put("k", "2")]).await,
        Err(Error::Dropped(_))
    ));
    let again = engine.keyspace("one").unwrap();
    assert!(entries(&*again, "").is_empty());
    put(&*again, "k", "3").await;
    assert!(matches!(engine.keyspace("no/slash"), Err(Error::InvalidName(_))));
}

async fn limits_are_named(engine: &dyn Engine) {
    let ks = engine.keyspace("limits").unwrap();
    let before = ks.revision();
    let ops = (0..ks.txn_ops_max() + 1).map(|i| Op::put(i.to_string(), "")).collect();
    assert!(matches!(ks.txn(vec![], ops).await, Err(Error::TooLarge { .. })));
    let huge = Op::put("k", Bytes::from(vec![0; store::ENTRY_BYTES_MAX]));
    assert!(matches!(ks.txn(vec![], vec![huge]).await, Err(Error::TooLarge { .. })));
    assert_eq!(ks.revision(), before);
}

async fn suite(engine: &dyn Engine) {
    checks_decide(engine).await;
    watch_is_ordered_and_bounded(engine).await;
    observer_sees_before_the_answer(engine).await;
    attachments_travel(engine).await;
    keyspaces_are_apart_and_droppable(engine).await;
    limits_are_named(engine).await;
}

#[tokio::test]
async fn model_engine_conforms() {
    suite(&*ModelEngine::new()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn local_engine_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let engine = LocalEngine::open(dir.path()).unwrap();
    suite(&*engine).await;
    let stats = engine.stats();
    assert!(
        stats.txns > 1500 && stats.conflicts >= 2 && stats.syncs <= stats.txns,
        "{stats:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_engine_conforms() {
    let etcd = etcd::Etcd::start();
    suite(&*etcd.engine(1)).await;
}

/// Opens `dir` once the previous engine of this process has let go of it.
async fn reopen(dir: &std::path::Path) -> Arc<LocalEngine> {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        match LocalEngine::open(dir) {
            Ok(engine) => return engine,
            Err(error) if std::time::Instant::now() > deadline => panic!("{error:?}"),
            Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
        }
    }
}

#[tokio::test]
async fn reopening_recovers_values_and_the_revision() {
    let dir = tempfile::tempdir().unwrap();
    let (kept, last) = {
        let engine = LocalEngine::open(dir.path()).unwrap();
        let ks = engine.keyspace("c").unwrap();
        for i in 0..100 {
            put(&*ks, &format!("k{i:03}"), "v").await;
        }
        let kept = entries(&*ks, "");
        put(&*ks, "gone", "x").await;
        (kept, ks.txn(vec![], vec![Op::delete("gone")]).await.unwrap())
    };
    let engine = reopen(dir.path()).await;
    let ks = engine.keyspace("c").unwrap();
    assert_eq!(ks.revision(), last, "a deletion at the end must not be forgotten");
    assert_eq!(entries(&*ks, ""), kept);
    assert!(matches!(ks.watch(last - 1), Err(WatchError::Compacted { .. })));
    assert!(put(&*ks, "k000", "w").await > last);
}

#[tokio::test]
async fn any_bytes_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let mut state = 7_u64;
    let mut random = |n: usize| -> Vec<u8> {
        (0..n)
            .map(|_| {
                state = state
                    .wrapping_mul(6364136223846793005)
                    .wrapping_add(1442695040888963407);
                (state >> 33) as u8
            })
            .collect()
    };
    let values: Vec<Vec<u8>> = (0..60).map(|i| random([0, 1, 7, 200, 300, 5000][i % 6])).collect();
    {
        let engine = LocalEngine::open(dir.path()).unwrap();
        let ks = engine.keyspace("c").unwrap();
        for (i, value) in values.iter().enumerate() {
            ks.txn(vec![], vec![Op::put(format!("k{i:03}"), value.clone())])
                .await
                .unwrap();
        }
    }
    let engine = reopen(dir.path()).await;
    let ks = engine.keyspace("c").unwrap();
    let mut found = Vec::new();
    ks.range(b"", &mut |e| found.push(e.value.to_vec())).unwrap();
    assert!(found == values, "{} of {}", found.len(), values.len());
}
