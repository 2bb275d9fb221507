//! Orderly stopping: a token that asks, and a group that waits for the tasks that were asked.

use std::future::Future;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Asks tasks to stop. Clones are the same token; a child stops with its parent, not the other way round.
#[derive(Debug, Clone)]
pub struct Shutdown {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    flag: watch::Sender<bool>,
    children: Mutex<Vec<Weak<Inner>>>,
}

impl Shutdown {
    /// A token nobody has triggered.
    pub fn new() -> Self {
        Self {
            inner: Arc::new(Inner {
                flag: watch::Sender::new(false),
                children: Mutex::new(Vec::new()),
            }),
        }
    }

    /// A token that stops when this one does, and may be stopped alone.
    pub fn child(&self) -> Self {
        let child = Self::new();
        let mut children = self.inner.children.lock();
        children.retain(|c| c.strong_count() > 0);
        children.push(Arc::downgrade(&child.inner));
        drop(children);
        // Checked after registration: a trigger in between has either seen the child or is seen here.
        if self.is_triggered() {
            child.trigger();
        }
        child
    }

    /// Asks everyone to stop. Again is harmless.
    pub fn trigger(&self) {
        self.inner.flag.send_replace(true);
        let children: Vec<_> = self.inner.children.lock().drain(..).collect();
        for inner in children.into_iter().filter_map(|c| c.upgrade()) {
            Self { inner }.trigger();
        }
    }

    /// Whether stopping was asked for.
    pub fn is_triggered(&self) -> bool {
        *self.inner.flag.borrow()
    }

    /// Returns once stopping is asked for. Cancel safe. The future borrows nothing.
    pub fn wait(&self) -> impl Future<Output = ()> + Send + use<> {
        let this = self.clone();
        async move {
            let mut receiver = this.inner.flag.subscribe();
            // The sender lives in `this`, so this cannot fail before it is true.
            let _ = receiver.wait_for(|stop| *stop).await;
        }
    }

    /// Runs `future` until it ends or stopping is asked for; `None` if it was cut short.
    pub fn or_stop<F: Future>(&self, future: F) -> impl Future<Output = Option<F::Output>> + use<F> {
        let stop = self.wait();
        async move {
            tokio::select! {
                biased;
                () = stop => None,
                output = future => Some(output),
            }
        }
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

/// Tasks that are joined on shutdown. Dropping the group triggers its token but does not wait.
#[derive(Debug)]
pub struct TaskGroup {
    shutdown: Shutdown,
    tasks: Mutex<Vec<(String, JoinHandle<()>)>>,
}

impl TaskGroup {
    /// A group whose tasks stop with `parent`.
    pub fn new(parent: &Shutdown) -> Self {
        Self {
            shutdown: parent.child(),
            tasks: Mutex::new(Vec::new()),
        }
    }

    /// The token the group's tasks should watch.
    pub fn shutdown(&self) -> &Shutdown {
        &self.shutdown
    }

    /// Starts a task on the current runtime.
    pub fn spawn(&self, name: impl Into<String>, future: impl Future<Output = ()> + Send + 'static) {
        let handle = tokio::spawn(future);
        let mut tasks = self.tasks.lock();
        tasks.retain(|(_, task)| !task.is_finished());
        tasks.push((name.into(), handle));
    }

    /// Asks all tasks to stop and waits up to `patience` in total; the rest is aborted. Returns the names of tasks
    /// that were aborted or had panicked, empty if all ended well.
    pub async fn stop(&self, patience: Duration) -> Vec<String> {
        self.shutdown.trigger();
        let tasks = std::mem::take(&mut *self.tasks.lock());
        let deadline = tokio::time::Instant::now() + patience;
        let mut bad = Vec::new();
        for (name, mut handle) in tasks {
            match tokio::time::timeout_at(deadline, &mut handle).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::error!(task = name, %error, "task failed");
                    bad.push(name);
                }
                Err(_) => {
                    handle.abort();
                    tracing::warn!(task = name, "task did not stop in time and was aborted");
                    bad.push(name);
                }
            }
        }
        bad
    }
}

impl Drop for TaskGroup {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn children_stop_with_the_parent_and_stubborn_tasks_are_named() {
        let root = Shutdown::new();
        let group = TaskGroup::new(&root);
        let token = group.shutdown().clone();
        group.spawn("polite", async move { token.wait().await });
        group.spawn("stubborn", std::future::pending());
        let alone = root.child();
        alone.trigger();
        assert!(!root.is_triggered());
        root.trigger();
        assert!(root.child().is_triggered());
        assert_eq!(group.stop(Duration::from_secs(1)).await, ["stubborn"]);
        assert_eq!(root.or_stop(std::future::pending::<()>()).await, None);
    }
}
