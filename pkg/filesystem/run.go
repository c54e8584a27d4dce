package filesystem

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// The Debian package that has a program.
var packages = map[string]string{
	"mkfs.ext4":  "e2fsprogs",
	"e2fsck":     "e2fsprogs",
	"resize2fs":  "e2fsprogs",
	"mkfs.xfs":   "xfsprogs",
	"mkfs.btrfs": "btrfs-progs",
}

// How long a killed program may take to be gone, before it counts as hanging in
// the kernel.
const killGrace = 10 * time.Second

// run runs a program until it ends, or until ctx does, and then kills it with
// all its children. An exit code that has no bits but those of fine is success.
// The error has what the program wrote.
func run(ctx context.Context, fine int, command string, arguments ...string) error {
	// Wait for the program to be dead, and not only for ctx: what it still
	// writes would meet what the caller does next.
	waiting, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(killGrace, stop) })()

	device := arguments[len(arguments)-1]
	_, err := within(waiting, command+" "+device, func() (struct{}, error) {
		var output excerpt
		cmd := exec.CommandContext(ctx, command, arguments...)
		cmd.Stdout, cmd.Stderr = &output, &output
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		cmd.WaitDelay = time.Second
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case err == nil:
			return struct{}{}, nil
		case ctx.Err() != nil:
			return struct{}{}, fmt.Errorf("killed: %w", ctx.Err())
		case errors.Is(err, exec.ErrNotFound):
			return struct{}{}, fmt.Errorf("it is not installed (package %s): %w", packages[command], err)
		case errors.As(err, &exit) && exit.Exited() && exit.ExitCode()&^fine == 0:
			return struct{}{}, nil
		}
		if said := output.String(); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return struct{}{}, err
	}, nil)
	return err
}

// excerpt keeps the beginning and the end of what is written to it: the reason
// is in the first lines of some programs, and in the last of others.
type excerpt struct{ head, tail []byte }

const excerptHalf = 512

func (e *excerpt) Write(p []byte) (int, error) {
	n := len(p)
	room := min(n, excerptHalf-len(e.head))
	e.head = append(e.head, p[:room]...)
	e.tail = append(e.tail, p[room:]...)
	if spare := len(e.tail) - excerptHalf; spare > 0 {
		e.tail = append([]byte("…"), e.tail[spare:]...)
	}
	return n, nil
}

// String is in one line, as an error has to be.
func (e *excerpt) String() string {
	var lines []string
	for line := range strings.Lines(strings.ToValidUTF8(string(e.head)+string(e.tail), "?")) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}
