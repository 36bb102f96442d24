package vmm

import (
	"fmt"
	"slices"
	"strings"
)

// Commands are the words that `baton` takes first.
var Commands = []string{"check", "completion", "device", "events", "help", "migrate", "monitor", "run", "version"}

// BashCompletion is a script that makes bash complete baton's commands and options, the
// kinds that options take, and otherwise files.
func BashCompletion() string {
	var names []string
	var kinds strings.Builder
	for _, o := range options() {
		names = append(names, "-"+o.name)
		if o.key == "" {
			continue
		}
		var list []string
		for _, k := range o.kinds {
			list = append(list, k.name)
		}
		slices.Sort(list)
		fmt.Fprintf(&kinds, "\t-%s) words=%q ;;\n", o.name, strings.Join(list, " "))
	}
	slices.Sort(names)
	return fmt.Sprintf(`# baton's completion for bash: eval "$(baton completion bash)"
_baton() {
	local cur=${COMP_WORDS[COMP_CWORD]} words=
	case ${COMP_WORDS[COMP_CWORD-1]} in
%s	*)
		case $cur in
		-*) words=%q ;;
		*) [ "$COMP_CWORD" -gt 1 ] || words=%q ;;
		esac ;;
	esac
	COMPREPLY=($(compgen -W "$words" -- "$cur"))
}
complete -o default -F _baton baton
`, kinds.String(), strings.Join(names, " "), strings.Join(Commands, " "))
}
