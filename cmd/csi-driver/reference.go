package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/orlop-csi/orlop/pkg/driver"
)

// newReference is how docs/flags.md is made, and compared with what the binary
// really has.
func newReference(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:    "reference",
		Short:  "Print all commands, flags and metrics in Markdown",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(c *cobra.Command, _ []string) error {
			return asFailure(writeReference(c.OutOrStdout(), root))
		},
	}
}

func writeReference(out io.Writer, root *cobra.Command) error {
	var b strings.Builder
	b.WriteString("# Commands, flags and metrics\n\n")
	b.WriteString("This page is what `csi-driver reference` prints; `make update` writes it.\n")
	for _, c := range root.Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" {
			continue
		}
		about := c.Long
		if about == "" {
			about = c.Short + "."
		}
		fmt.Fprintf(&b, "\n## %s\n\n```text\n%s\n```\n", c.CommandPath(), about)
		if c.Example != "" {
			fmt.Fprintf(&b, "\nExample:\n\n```sh\n%s\n```\n", strings.TrimPrefix(strings.ReplaceAll(c.Example, "\n  ", "\n"), "  "))
		}
		b.WriteString("\n| flag | default | meaning |\n|---|---|---|\n")
		c.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Name == "help" {
				return
			}
			value, usage := pflag.UnquoteUsage(f)
			name := "`" + strings.TrimSpace("--"+f.Name+" "+value) + "`"
			if f.Shorthand != "" {
				name = "`-" + f.Shorthand + " " + value + "`, " + name
			}
			byDefault := ""
			if f.DefValue != "" {
				byDefault = "`" + f.DefValue + "`"
			}
			fmt.Fprintf(&b, "| %s | %s | %s |\n", name, byDefault, strings.ReplaceAll(usage, "|", `\|`))
		})
	}
	b.WriteString("\n## Metrics\n\n")
	b.WriteString("Served at `/metrics` of `--metrics-address`, beside those of the Go runtime (`go_…`) and of the process (`process_…`).\n\n")
	b.WriteString("| metric | type | labels | meaning |\n|---|---|---|---|\n")
	for _, m := range driver.Metrics() {
		labels := ""
		if len(m.Labels) > 0 {
			labels = "`" + strings.Join(m.Labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Type, labels, m.Help)
	}
	_, err := io.WriteString(out, b.String())
	return err
}
