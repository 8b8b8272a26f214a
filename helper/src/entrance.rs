//! Where requests come from. Standalone, one channel that was there at the start: with it this process ends. Under a
//! service manager, a socket that it listens on, with one broker behind it at a time: brokers come and go.

use bpfgate_lockdown::{Fatal, Step};
use bpfgate_protocol::channel::Channel;
use bpfgate_protocol::messages::helper::FromHelper;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::time::TimeSpec;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// How long a broker may leave an answer unread, in seconds. Late answers are for nobody: such a broker is lost.
const PATIENCE: i64 = 5;

pub(crate) enum Entrance {
    Channel(Channel),
    Door {
        listener: OwnedFd,
        /// Nobody else is let in, whatever the mode of the socket became.
        broker_uid: u32,
        broker: Option<Channel>,
    },
}

impl Entrance {
    /// The broker, or the door if nobody is in.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Channel(broker) | Self::Door { broker: Some(broker), .. } => broker.as_fd(),
            Self::Door { listener, broker: None, .. } => listener.as_fd(),
        }
    }

    pub(crate) fn broker(&mut self) -> Option<&mut Channel> {
        match self {
            Self::Channel(broker) => Some(broker),
            Self::Door { broker, .. } => broker.as_mut(),
        }
    }

    /// The channel's first message, where it is there already.
    pub(crate) fn begin(&self, ready: &FromHelper) -> Result<(), Fatal> {
        match self {
            Self::Channel(broker) => broker.send(ready, &[]).step("telling the broker"),
            Self::Door { .. } => Ok(()),
        }
    }

    /// Deadlines for the channel, where it is there already: later there is no system call for it.
    pub(crate) fn prepare(&self) -> Result<(), Fatal> {
        match self {
            Self::Channel(broker) => broker.set_timeouts(PATIENCE, 0).step("setting deadlines"),
            Self::Door { .. } => Ok(()),
        }
    }

    /// Takes the broker that knocks.
    pub(crate) fn let_in(&mut self, ready: &FromHelper) -> Result<(), Fatal> {
        let Self::Door { listener, broker_uid, broker } = self else { return Ok(()) };
        let channel = Channel::accept(listener.as_fd()).step("a broker")?;
        let peer = getsockopt(&channel, sockopt::PeerCredentials).step("who the broker is")?;
        if peer.uid() != *broker_uid {
            let (uid, pid) = (peer.uid(), peer.pid());
            return Err(Fatal(format!("uid {uid} (pid {pid}) is not the broker; its connection is closed")));
        }
        channel.set_send_timeout(PATIENCE).step("setting deadlines")?;
        channel.send(ready, &[]).step("telling the broker")?;
        *broker = Some(channel);
        Ok(())
    }

    /// The broker is gone. Gives whether another one may come.
    pub(crate) fn lost(&mut self) -> bool {
        match self {
            Self::Channel(_) => false,
            Self::Door { broker, .. } => {
                *broker = None;
                true
            }
        }
    }

    /// Nobody will be served: who knocks is sent away. One who was left standing there would have this process started
    /// again and again.
    pub(crate) fn turn_away(&self) {
        let Self::Door { listener, .. } = self else { return };
        let mut knocks = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        let now = Some(TimeSpec::new(0, 0));
        while ppoll(&mut knocks, now, None).is_ok_and(|n| n > 0) && Channel::accept(listener.as_fd()).is_ok()
        {
        }
    }
}
