//! News from the supervisor: a thread that listens for exits, and the comparison with its list after every gap.

use std::{
    sync::{Arc, Weak},
    time::{Duration, SystemTime},
};

use super::{Inner, io, records::ContainerPhase, supervisor};
use crate::{api::Error, supervisor::protocol::Exit};

const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Starts the thread. It ends when the engine is dropped.
pub fn watch(inner: &Arc<Inner>) -> Result<(), Error> {
    let weak = Arc::downgrade(inner);
    std::thread::Builder::new()
        .name("exits".to_owned())
        .spawn(move || listen(&weak))
        .map(drop)
        .map_err(io("start a thread"))
}

fn listen(weak: &Weak<Inner>) {
    loop {
        let Some(inner) = weak.upgrade() else { return };
        let client = inner.supervisor.clone();
        let stream = client
            .watch()
            .inspect(|stream| *inner.watch.lock() = stream.try_clone().ok());
        // Between the last event and this watch some may have been missed.
        let known = stream.is_ok().then(|| inner.reconcile_exits());
        drop(inner);
        match (stream, known) {
            (Ok(mut stream), Some(Ok(()))) => {
                while let Ok(exit) = client.next_exit(&mut stream) {
                    let Some(inner) = weak.upgrade() else { return };
                    inner.take_news(&exit);
                }
            }
            (Err(error), _) => tracing::warn!(%error, "the supervisor cannot be watched"),
            (_, Some(Err(error))) => tracing::warn!(%error, "the supervisor's list cannot be read"),
            (Ok(_), None) => {}
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

impl Inner {
    fn take_news(&self, exit: &Exit) {
        // Commands inside containers are waited for where they were started.
        let Ok(container) = self.container(&exit.id) else {
            return;
        };
        self.take_exit(&container, exit);
        // Recorded on our disk: the supervisor need not keep it.
        if let Err(error) = self.supervisor.forget(&exit.id) {
            tracing::warn!(container = exit.id, %error, "an exit could not be acknowledged");
        }
    }

    /// Makes the records agree with the supervisor's list.
    pub fn reconcile_exits(&self) -> Result<(), Error> {
        let list = self
            .supervisor
            .list()
            .map_err(supervisor("list the supervisor's processes"))?;
        let containers: Vec<_> = self.containers.lock().values().cloned().collect();
        for container in containers {
            let phase = container.record().phase;
            match list.iter().find(|process| process.id == container.id) {
                Some(process) => match &process.exit {
                    Some(exit) => self.take_news(exit),
                    // Started while nobody looked.
                    None if phase == ContainerPhase::Starting && process.pid != 0 => self.note_running(&container),
                    None => {}
                },
                None if phase == ContainerPhase::Running => self.lost(&container, "its exit was not recorded"),
                // A start in this process is not in the list before its helper runs; one of a former process never will be.
                None if phase == ContainerPhase::Starting && container.verb.try_lock().is_ok() => {
                    self.lost(&container, "the node agent died while it was started");
                }
                None => {}
            }
        }
        Ok(())
    }

    fn lost(&self, container: &super::Container, message: &str) {
        // The supervisor may have died and left its children running, with nobody to log or reap them.
        self.kill_container(container);
        self.record_exit(container, 137, "ContainerStatusUnknown", message, SystemTime::now());
    }
}
